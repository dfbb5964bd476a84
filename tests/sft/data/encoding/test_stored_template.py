"""What is said of a tokenizer's files is what is said of the tokenizer that transformers makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.spec import DataSpec
from sft.data.encoding.stored_template import template_problem
from sft.data.encoding.tokenizer import chat_template, load_tokenizer
from tests.tiny_model import make_tokenizer

NAMED = [{"name": name, "template": f"{{{{ messages }}}} {name}"} for name in ("default", "tool_use", "rag")]


@pytest.mark.parametrize(
    ("files", "config"),
    [
        ((), None),
        ((), ""),
        ((), "{{ messages }}"),
        ((), NAMED),
        ((), NAMED[1:]),
        ((), NAMED[1:2]),
        ((), []),
        (("chat_template.jinja",), None),
        (("chat_template.jinja", "additional_chat_templates/tool_use.jinja"), None),
        (("additional_chat_templates/tool_use.jinja",), "{{ messages }}"),
        (("additional_chat_templates/tool_use.jinja", "additional_chat_templates/rag.jinja"), "{{ messages }}"),
        (("chat_template.json",), None),
    ],
)
def test_it_is_what_prepare_says(files: tuple[str, ...], config: object, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": config}))
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = "{{ messages }}" if name.endswith(".jinja") else json.dumps({"chat_template": "{{ messages }}"})
        (tmp_path / name).write_text(text)
    said = None
    try:
        chat_template(load_tokenizer(tmp_path), DataSpec())
    except ModelError as error:
        (said,) = error.problems
    assert template_problem(tmp_path, DataSpec()) == said
    assert template_problem(tmp_path, DataSpec(chat_template="zephyr")) is None
    (tmp_path / "tekken.json").write_text("{}")
    assert template_problem(tmp_path, DataSpec()) is None


def test_files_that_are_not_there_yet_say_nothing(tmp_path: Path) -> None:
    assert template_problem(tmp_path, DataSpec()) is None
    (tmp_path / "tokenizer.json").touch()
    (tmp_path / "tokenizer_config.json").write_text("{")
    assert template_problem(tmp_path, DataSpec()) is None
