"""The tokens that end an answer of an exported model are those that were trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import CheckpointError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import DataSpec, RunSpec
from sft.data.prepared.prepare import open_or_build
from sft.hf.stop_tokens import add_stop_tokens, record_stop_tokens, recorded_stop_tokens
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl


def ends_of(tmp_path: Path, end: str = "<|im_end|>", **settings: Any) -> set[int]:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = end
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "rows.jsonl", make_chat_rows(8, seed=0))
    data = DataSpec(train=[str(tmp_path / "rows.jsonl")], cache_dir=str(tmp_path / "cache"), workers=1, **settings)
    return open_or_build(RunSpec(data=data), tmp_path / "tokenizer", build=True).stop_tokens


def test_the_end_of_the_turns_is_known_whatever_the_tokenizer_calls_its_end(tmp_path: Path) -> None:
    """Seen to be missing from the export: a tokenizer that ends with `<|endoftext|>` under a ChatML template."""
    tokenizer = make_tokenizer()
    assert ends_of(tmp_path, "<|endoftext|>") == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    ("settings", "config", "expected"),
    [
        ({"eos_token_id": 5, "temperature": 0.6}, {}, {"eos_token_id": [5, 7], "temperature": 0.6}),
        ({"eos_token_id": [7, 5]}, {}, {"eos_token_id": [7, 5]}),
        ({}, {}, {"eos_token_id": [7]}),
        (None, {"eos_token_id": 5}, {"eos_token_id": [5, 7]}),
        (None, {"eos_token_id": 7}, None),
        (None, {"text_config": {"eos_token_id": 5}}, {"eos_token_id": [5, 7]}),
    ],
)
def test_trained_ends_come_behind_those_of_the_source(
    settings: Any, config: Any, expected: Any, tmp_path: Path
) -> None:
    """Those of an adapter's model were seen to be missing, where that has no generation_config.json."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    file = tmp_path / "generation_config.json"
    if settings is not None:
        file.write_text(json.dumps(settings))
    adapter = tmp_path / "adapter"  # has no config.json
    adapter.mkdir()
    if settings is not None:
        shutil.copy(file, adapter)
    for directory in (adapter, tmp_path):
        add_stop_tokens(directory, tmp_path, {7})
        written = directory / file.name
        assert (json.loads(written.read_text()) if written.exists() else None) == expected, directory


def test_the_record_of_a_run(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert recorded_stop_tokens(paths) == []
    record_stop_tokens(paths, {9, 3})
    assert recorded_stop_tokens(paths) == [3, 9]
    for damaged in ("{}", "[]", '{"trained": ["x"]}'):
        paths.stop_tokens.write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            recorded_stop_tokens(paths)
