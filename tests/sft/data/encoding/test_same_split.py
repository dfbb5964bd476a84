"""A tokenizer from elsewhere must split texts in the export as in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.errors import ModelError
from sft.data.encoding.same_split import check_split_of_export, unlike_its_file
from tests.tiny_model import make_tokenizer


def with_joined_digits(directory: Path) -> Path:
    """Write a tokenizer that has a token for "12"."""
    make_tokenizer().save_pretrained(directory)
    file = directory / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"].append(["1", "2"])
    settings["model"]["vocab"]["12"] = len(settings["model"]["vocab"])
    file.write_text(json.dumps(settings))
    return directory


def test_a_class_that_the_models_config_chooses_may_split_otherwise(tmp_path: Path) -> None:
    """Seen to train on runs of digits, and to export a tokenizer that takes them apart."""
    own, model = with_joined_digits(tmp_path / "tokenizer"), tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    check_split_of_export(own, model)  # which chooses no class for this one
    (model / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(ModelError, match=r"class TokenizersBackend, than in the export, .* takes Qwen2Tokenizer"):
        check_split_of_export(own, model)
    (own / "config.json").write_bytes((model / "config.json").read_bytes())
    check_split_of_export(own, model)


def test_a_class_that_does_not_follow_the_file_is_named(tmp_path: Path) -> None:
    """SmolLM2's is one: its file puts digits apart, and transformers' class splits as GPT-2 does."""
    directory = with_joined_digits(tmp_path / "tokenizer")
    assert unlike_its_file(directory) is None
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    remark = unlike_its_file(directory)
    assert remark is not None
    assert remark.startswith("tokenizer: transformers loads Qwen2Tokenizer, which splits words otherwise than")
    assert unlike_its_file(tmp_path) is None  # which has no such file
