"""Keys of rows that a template would read if they were handed to it: refused, as it would write another text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.contract.errors import DataError, ModelError
from launcher.contract.spec import DataSpec
from sft.data.encoding.masking import Encoder
from sft.data.encoding.template_reads import TemplateReads
from sft.data.reading.formats import parse_row
from tests.sft.data.encoding.test_mask_oracle import templates, tokenizer_for

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


def encode(family: str, row: dict[str, Any], *ignored: str) -> int:
    template = (templates() / f"{family}.jinja").read_text()
    example = parse_row(json.dumps(row).encode(), "a.jsonl:1", "messages", {}, ignored)
    return len(Encoder(tokenizer_for(template, template), DataSpec(ignore_keys=list(ignored))).encode(example))


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("qwen3", "enable_thinking", False),
        ("gptoss", "reasoning_effort", "high"),
        ("gptoss", "model_identity", "You are nobody."),
        ("llama3_1", "date_string", "1 Jan 2001"),
    ],
)
def test_a_row_that_sets_a_variable_of_the_template_is_refused(family: str, key: str, value: object) -> None:
    """Seen to be named as a key that nothing reads, and the row to be trained with the default."""
    row = {"messages": CHAT, key: value}
    with pytest.raises(DataError, match=rf"a\.jsonl:1: the chat template reads '{key}', which the row has"):
        encode(family, row)
    assert encode(family, row, key) == 1
    assert encode("phi3", row) == 1, "a template that does not read it"


def test_a_key_of_a_turn_that_the_template_reads_is_refused() -> None:
    row = {"messages": [CHAT[0], {**CHAT[1], "end_turn": True}]}
    with pytest.raises(DataError, match="the chat template reads 'end_turn', which a message has"):
        encode("muse_glimmer", row)
    assert encode("muse_glimmer", row, "end_turn") == 1
    assert encode("qwen2_5", row) == 1
    reads = TemplateReads(["{{ message.end_turn }}"])
    with pytest.raises(DataError, match="reads 'end_turn', which a message has"):
        reads.check(["completion[].end_turn"], [])


@pytest.mark.parametrize("name", ["message", "content", "im_start", "endfor", "loop", "enable_thinkng"])
def test_a_word_of_a_template_is_no_variable_of_it(name: str) -> None:
    """Seen to be taken for one because it is in the text, as a key, a part of a token or a loop's own variable."""
    template = (templates() / "qwen2_5.jinja").read_text() + "{# enable_thinkng #}"
    example = parse_row(json.dumps({"messages": CHAT}).encode(), "a.jsonl:1", "messages", {})
    encoder = Encoder(tokenizer_for(template, template), DataSpec(chat_template_kwargs={name: "1"}))
    with pytest.raises(ModelError, match=rf"the chat template does not read '{name}'"):
        encoder.encode(example)


def test_a_variable_that_a_template_sets_on_one_path_is_read_on_the_other() -> None:
    reads = TemplateReads(["{% if messages %}{% set mood = 'calm' %}{% endif %}{{ mood }}", "{{ flag }}"])
    reads.check_given(["mood", "flag"])
    with pytest.raises(ModelError, match="does not read 'flags'; did you mean 'flag'"):
        reads.check_given(["flags"])
    TemplateReads(["{{ flag | nope }}"]).check_given(["flag"])  # rendering refuses the filter


def test_names_of_a_templates_own_are_none_of_a_row() -> None:
    template = (
        "{% set note = 1 %}{% for part in messages %}{{ part.role ~ note ~ given }}{% endfor %}"
        "{% if mood is not defined %}{% set mood = 'calm' %}{% endif %}{% generation %}{{ mood }}{% endgeneration %}"
    )
    reads = TemplateReads([template])
    reads.check(["note", "part", "messages[].note"], [])
    for name in ("given", "mood"):
        with pytest.raises(DataError, match=f"reads '{name}'"):
            reads.check([name], [])
