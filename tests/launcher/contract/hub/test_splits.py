"""Files of a split: by the README's front matter, by shards, by names, by folders."""

from __future__ import annotations

import pytest

from launcher.contract.errors import HubError
from launcher.contract.hub.splits import Wanted, split_files

CARD = """---
license: mit
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: data/train_sft-*
  - split: test_sft
    path: data/test_sft-*
- config_name: small
  data_files: small/*.jsonl
---
# A data set
"""
SHARDED = [
    "README.md",
    "data/train_sft-00000-of-00002-a3ec.parquet",
    "data/train_sft-00001-of-00002-b1ff.parquet",
    "data/train_gen-00000-of-00001.parquet",
    "data/test_sft-00000-of-00001.parquet",
    "small/a.jsonl",
]


@pytest.mark.parametrize(
    ("names", "card", "wanted", "expected"),
    [
        (SHARDED, CARD, Wanted(split="train_sft"), SHARDED[1:3]),
        (SHARDED, CARD, Wanted(split="train", config="small"), ["small/a.jsonl"]),
        (SHARDED, None, Wanted(split="train_gen"), ["data/train_gen-00000-of-00001.parquet"]),
        (["train.jsonl", "test.jsonl", "README.md"], None, Wanted(split="train"), ["train.jsonl"]),
        (["x_dev.csv", "x_train.csv"], None, Wanted(split="validation"), ["x_dev.csv"]),
        (["train/a.json", "train/b.json", "val/a.json"], None, Wanted(split="train"), ["train/a.json", "train/b.json"]),
        (["rows.jsonl", ".gitattributes", "dataset_info.json"], None, Wanted(split="train"), ["rows.jsonl"]),
        (
            ["main/train/0000.parquet", "socratic/train/0000.parquet"],
            None,
            Wanted(split="train", config="main"),
            ["main/train/0000.parquet"],
        ),
        (
            ["default/train_sft/0000.parquet", "default/train_gen/0000.parquet"],
            None,
            Wanted(split="train_sft"),
            ["default/train_sft/0000.parquet"],
        ),
        (["data.jsonl.gz"], "no front matter", Wanted(split="train"), ["data.jsonl.gz"]),
    ],
)
def test_files_of_a_split(names: list[str], card: str | None, wanted: Wanted, expected: list[str]) -> None:
    assert split_files(names, card, wanted) == expected


@pytest.mark.parametrize(
    ("names", "card", "wanted", "message"),
    [
        (SHARDED, CARD, Wanted(split="train"), "no split 'train'.*it has test_sft, train_sft"),
        (SHARDED, CARD, Wanted(split="train", config="smal"), "no config 'smal'; did you mean 'small'"),
        (SHARDED[:2], None, Wanted(split="train_sft"), "of 2 files .* only 1 are there"),
        (["main/train/0.parquet", "socratic/train/0.parquet"], None, Wanted(split="train"), "several configs"),
        (["train.jsonl", "train.parquet"], None, Wanted(split="train"), "several kinds .jsonl, parquet."),
        (["gsm8k.py", "README.md"], None, Wanted(split="train"), "scripts are not run"),
        (["a.jsonl"], None, Wanted(split="train", config="main"), "no config 'main'"),
    ],
)
def test_refusals_say_what_there_is(names: list[str], card: str | None, wanted: Wanted, message: str) -> None:
    with pytest.raises(HubError, match=message):
        split_files(names, card, wanted)
