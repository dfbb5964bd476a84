"""What the launcher expects of the batches of a run is what its ranks find."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.rundir import write_json
from launcher.contract.spec import DataSpec, RunSpec, SourceSpec, TrainSpec
from sft.data.cache import key as cache_keys
from sft.data.cache.key import MANIFEST, cache_folder
from sft.data.prepared import data_key as keys
from sft.data.prepared.data_key import DataKey, data_key, expected_data_key, order_key
from sft.data.prepared.data_sets import training_sets
from sft.data.prepared.prepare import open_or_build
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl

Change = Callable[[RunSpec, Path], RunSpec]


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def spec_of(tmp_path: Path) -> RunSpec:
    files = [str(write_jsonl(tmp_path / f"{name}.jsonl", make_chat_rows(12, seed))) for seed, name in enumerate("ab")]
    sources = {name: SourceSpec(files=[file]) for name, file in zip("ab", files, strict=True)}
    return RunSpec(data=DataSpec(sources=sources, cache_dir=str(tmp_path / "cache"), workers=1, seq_length=512))


def found(spec: RunSpec, tokenizer_dir: Path) -> DataKey:
    """Return what the ranks of a run find, as a checkpoint records it."""
    prepared = open_or_build(spec, tokenizer_dir, build=True)
    names = [data_set.key for data_set in training_sets(spec.data)]
    contents = {name: cache.key for name, cache in zip(names, prepared.training_caches, strict=True)}
    key: DataKey = json.loads(json.dumps(data_key(spec, contents)))
    return key


def with_data(**changes: Any) -> Change:
    return lambda spec, _: dataclasses.replace(spec, data=dataclasses.replace(spec.data, **changes))


def with_train(**changes: Any) -> Change:
    return lambda spec, _: dataclasses.replace(spec, train=TrainSpec(**changes))


def with_edited(name: str, text: str) -> Change:
    def change(spec: RunSpec, folder: Path) -> RunSpec:
        with (folder / name).open("a") as file:
            file.write(text)
        return spec

    return change


def with_copy(spec: RunSpec, folder: Path) -> RunSpec:
    """The same rows under another name."""
    copy = str(shutil.copy(folder / "a.jsonl", folder / "copy.jsonl"))
    sources = {**spec.data.sources, "a": dataclasses.replace(spec.data.sources["a"], files=[copy])}
    return dataclasses.replace(spec, data=dataclasses.replace(spec.data, sources=sources))


ROW = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
CHANGES: dict[str, tuple[Change, bool]] = {
    "nothing": (lambda spec, _: spec, True),
    "files moved": (with_copy, True),
    "workers and padding": (with_data(workers=2, pad_to_multiple=16), True),
    "a longer run": (with_train(epochs=9.0), True),
    "a row more": (with_edited("a.jsonl", ROW), False),
    "another template in the tokenizer": (with_edited("tokenizer/chat_template.jinja", "{# other #}"), False),
    "seq_length": (with_data(seq_length=256), False),
    "loss_on": (with_data(loss_on="all"), False),
    "packing": (with_data(packing=True), False),
    "shuffle": (with_data(shuffle=False), False),
    "group_by_length": (with_data(group_by_length=True), False),
    "seed": (with_train(seed=7), False),
    "batch": (with_train(global_batch_size=2), False),
    "tokens": (with_train(global_batch_unit="tokens", global_batch_size=1024), False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_it_is_what_the_ranks_find(name: str, tmp_path: Path, tokenizer_dir: Path) -> None:
    change, is_same = CHANGES[name]
    before = found(spec_of(tmp_path), tokenizer_dir)
    spec = change(spec_of(tmp_path), tmp_path)
    expected = expected_data_key(spec, before, tokenizer_dir, same_settings=False)
    assert expected == found(spec, tokenizer_dir)
    assert (expected == before) == is_same


def test_another_weight_and_another_order_of_sources_are_told() -> None:
    one, two = (SourceSpec(files=["a"], weight=weight) for weight in (1.0, 2.5))
    data = [DataSpec(sources=sources) for sources in ({"a": one, "b": one}, {"a": one, "b": two}, {"b": one, "a": one})]
    assert len({str(order_key(RunSpec(data=each))) for each in data}) == 3


def test_the_cyclic_order_belongs_to_the_number_of_steps() -> None:
    specs = [
        RunSpec(data=DataSpec(cyclic_seed=seed), train=TrainSpec(max_steps=steps))
        for seed, steps in ((1, 5), (1, 6), (2, 5))
    ]
    assert len({str(order_key(spec)) for spec in specs}) == 3


@pytest.mark.parametrize("large", [False, True])
def test_a_run_as_it_was_is_told_only_of_its_files(
    large: bool, tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs its own copy of the code, whose version may be another one than the launcher's."""
    if large:
        monkeypatch.setattr(keys, "_WHOLE", 0)
    spec = spec_of(tmp_path)
    before = found(spec, tokenizer_dir)
    monkeypatch.setattr(keys, "CODE_VERSION", 99)
    monkeypatch.setattr(cache_keys, "_POLICIES", ("seq_length",))
    assert expected_data_key(spec, before, tokenizer_dir, same_settings=True) == before
    assert expected_data_key(spec, before, tokenizer_dir, same_settings=False) != before
    with_edited("b.jsonl", ROW)(spec, tmp_path)
    now = expected_data_key(spec, before, tokenizer_dir, same_settings=True)
    assert [name for name in before if now[name] != before[name]] == ["data.sources.b"]
    assert (now["data.sources.b"] == keys.HASH + keys.NOT_READ) == large


def test_what_cannot_be_known_is_as_it_was(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Files that are still to come, a cache that was removed, and one that an earlier version has made."""
    spec = spec_of(tmp_path)
    before = found(spec, tokenizer_dir)
    other = with_data(loss_on="all")(spec, tmp_path)
    assert expected_data_key(other, before, tokenizer_dir, same_settings=False) != before
    assert expected_data_key(other, before, None, same_settings=False) == before
    ours, theirs = (str(before[f"data.sources.{name}"]).removeprefix("sha256:") for name in "ab")
    manifest_file = cache_folder(spec.cache_dir, ours) / MANIFEST
    manifest = json.loads(manifest_file.read_text())
    del manifest["made_from"]
    write_json(manifest_file, manifest)
    gone = cache_folder(spec.cache_dir, theirs).rename(tmp_path / "gone")
    assert expected_data_key(other, before, tokenizer_dir, same_settings=False) == before
    gone.rename(cache_folder(spec.cache_dir, theirs))
    (tmp_path / "b.jsonl").unlink()
    assert expected_data_key(other, before, tokenizer_dir, same_settings=False) == before
