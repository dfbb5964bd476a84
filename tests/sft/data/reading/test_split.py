"""data.validation_split: each row on one side, the same one in any order."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.config.load import load_config
from launcher.contract.errors import ConfigError, DataError
from launcher.contract.spec import DataSpec, LoggingSpec, RunSpec
from sft.data.audit.audit import audit_data
from sft.data.cache.store import TokenCache
from sft.data.prepared.prepare import PreparedData, open_or_build
from tests.tiny_model import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def row(number: int) -> str:
    return json.dumps({"prompt": f"question {number}", "completion": f"answer {number}"})


ROWS = [row(number) for number in range(200)]


def prepared(file: Path, split: str, tokenizer_dir: Path, **data: Any) -> PreparedData:
    cache_dir = str(file.parent / "cache")
    values = {"train": [str(file)], "validation_split": split, "cache_dir": cache_dir, "workers": 1, **data}
    spec = RunSpec(data=DataSpec(**values), logging=LoggingSpec(progress_bar=False))
    return open_or_build(spec, tokenizer_dir, build=True)


def texts(cache: Any) -> set[tuple[int, ...]]:
    assert isinstance(cache, TokenCache)
    return {tuple(cache.tokens(index)[0].tolist()) for index in range(len(cache))}


@pytest.mark.parametrize(("split", "held_out"), [("10%", 20), ("0.5%", 1), ("33", 33)])
def test_as_many_rows_as_asked_are_held_out(tmp_path: Path, tokenizer_dir: Path, split: str, held_out: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ROWS))
    found = prepared(file, split, tokenizer_dir)
    assert found.validation is not None
    assert (len(found.train), len(found.validation)) == (200 - held_out, held_out)
    assert not texts(found.train) & texts(found.validation)


def test_order_compression_and_chat_change_no_side(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(ROWS))
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(shuffled).encode()))
    one, other = (prepared(tmp_path / name, "10%", tokenizer_dir) for name in ("a.jsonl", "b.jsonl.gz"))
    assert texts(one.validation) == texts(other.validation)
    assert texts(one.train) == texts(other.train)


def test_equal_rows_are_on_one_side(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ROWS * 3))
    found = prepared(file, "5%", tokenizer_dir)
    assert found.validation is not None and len(found.validation) == 30
    assert not texts(found.train) & texts(found.validation)


def test_pieces_of_a_row_are_on_one_side(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{number} " * 40}) for number in range(20)))
    found = prepared(file, "4", tokenizer_dir, seq_length=16, length_policy="split")
    assert found.validation is not None and found.validation.counts.rows == 4
    assert not texts(found.train) & texts(found.validation)


def test_another_split_has_another_cache(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ROWS))
    keys = {prepared(file, split, tokenizer_dir).training_caches[0].key for split in ("10%", "11%", "")}
    assert len(keys) == 3


@pytest.mark.parametrize("split", ["200", "0.1%", "99.9%", "0%"])
def test_a_split_that_leaves_one_side_empty_is_refused(tmp_path: Path, tokenizer_dir: Path, split: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ROWS))
    with pytest.raises(DataError, match=r"data\.validation_split: .* of 200 rows is .*one row must be on each side"):
        prepared(file, split, tokenizer_dir)
    file.write_text("\n".join(ROWS[:1] * 10))
    with pytest.raises(DataError, match="leaves none to train on, because rows are equal"):
        prepared(file, "50%", tokenizer_dir)


def test_the_audit_looks_at_both_sides(tmp_path: Path, tokenizer_dir: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(ROWS))
    values: dict[str, Any] = {"train": [str(file)], "validation_split": "50%", "cache_dir": str(tmp_path / "cache")}
    train, held_out = audit_data(RunSpec(data=DataSpec(**values, workers=1)), tokenizer_dir)
    assert (train.cache.counts.rows, held_out.cache.counts.rows, held_out.held_out_in_train) == (100, 100, 0)
    places = [{sample.where for sample in each.samples} for each in (train, held_out)]
    assert places[0] and places[1] and not places[0] & places[1]


@pytest.mark.parametrize(
    "extra", ["data.validation=[a.jsonl]", "data.validation_split=100%", "data.validation_split=x"]
)
def test_what_a_config_may_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, extra: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(ROWS[0])
    Path("model").mkdir()
    text = "name: x\ncluster: local\nmodel: {path: model}\ntrain: {max_steps: 1, eval_every: 1}\n"
    Path("cfg.yaml").write_text(text + "data: {train: [a.jsonl], validation_split: 1%}\n")
    try:
        load_config(Path("cfg.yaml"))
    except ConfigError as error:
        assert not [problem for problem in error.problems if "validation_split" in problem or "eval_every" in problem]
    with pytest.raises(ConfigError, match=r"data\.validation_split"):
        load_config(Path("cfg.yaml"), [extra])
