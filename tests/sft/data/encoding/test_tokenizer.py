"""Loading tokenizers, and what is said about the ones that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from launcher.contract.spec import DataSpec
from sft.data.encoding.tokenizer import (
    ChatTemplates,
    chat_template,
    control_tokens,
    end_of_text,
    leading_ids,
    load_tokenizer,
    tokenizer_files,
)
from tests.sft.tokenizers_for_tests import LLAMA_TEMPLATE, byte_level, sentencepiece_like
from tests.tiny_model import make_tokenizer


def test_a_saved_tokenizer_comes_back_the_same(tmp_path: Path) -> None:
    original = make_tokenizer()
    original.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("I saw 3 otters")["input_ids"] == original("I saw 3 otters")["input_ids"]
    assert loaded.chat_template == original.chat_template
    assert [path.name for path in tokenizer_files(tmp_path)] == [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]


def test_long_texts_cause_no_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """data.seq_length is the limit; model_max_length (512 here) would print a warning for each long row."""
    make_tokenizer().save_pretrained(tmp_path)
    assert len(load_tokenizer(tmp_path)("otter " * 2000)["input_ids"]) > 512
    assert not caplog.records


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tokenizer: .*absent is not a directory"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no tokenizer in .*: it holds none of tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cuts_words_at_random_is_refused(tmp_path: Path) -> None:
    """Seen to be used: BPE with dropout, whose ids were masked by the offsets of another cut."""
    make_tokenizer().save_pretrained(tmp_path)
    file = tmp_path / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["dropout"] = 0.1
    file.write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"cuts words at random \(model.dropout 0.1 in its tokenizer.json\)"):
        load_tokenizer(tmp_path)
    settings["model"]["dropout"] = 0.0
    file.write_text(json.dumps(settings))
    load_tokenizer(tmp_path)


def test_facts_about_a_tokenizer() -> None:
    tokenizer = sentencepiece_like()
    assert control_tokens(tokenizer) == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert end_of_text(tokenizer) == 2
    assert leading_ids(tokenizer) == [1]
    assert leading_ids(byte_level()) == []


def test_a_tokenizer_without_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos_token"):
        end_of_text(tokenizer)


def test_the_template_is_the_tokenizers_or_a_file_or_none(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{{ messages }}")
    tokenizer = sentencepiece_like()
    assert chat_template(tokenizer, DataSpec()) == ChatTemplates(LLAMA_TEMPLATE)
    assert chat_template(tokenizer, DataSpec(chat_template=str(file))) == ChatTemplates("{{ messages }}")
    assert chat_template(tokenizer, DataSpec(chat_template="none")) is None


def test_a_template_that_is_not_there_is_named(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match=r"data\.chat_template: the tokenizer has no chat template"):
        chat_template(tokenizer, DataSpec())
    with pytest.raises(ModelError, match=r"data\.chat_template: .*absent\.jinja cannot be read"):
        chat_template(tokenizer, DataSpec(chat_template=str(tmp_path / "absent.jinja")))
