"""Names of caches: everything that decides their bytes is in the key, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.rundir import write_json
from launcher.contract.spec import DataSpec, RunSpec, SourceSpec
from sft.data.cache.key import (
    _ONLY_REFUSE,
    _POLICIES,
    CODE_VERSION,
    FORMAT_VERSION,
    MANIFEST,
    code_versions,
    key_of,
    made_from,
)
from sft.data.cache.store import _digest
from sft.data.encoding.tokenizer import tokenizer_files
from sft.data.prepared import prepare
from sft.data.prepared.prepare import open_or_build
from sft.data.reading import messages
from sft.data.reading.files import sha256_of
from sft.data.reading.split import Side
from tests.sft.data.prepared.test_prepare import arrays_of, spec_of
from tests.sft.tokenizers_for_tests import sentencepiece_like
from tests.tiny_model import CHAT_TEMPLATE, make_chat_rows, make_tokenizer, write_jsonl


def cache_key(
    data: DataSpec, content: list[str], tokenizer_dir: Path, side: Side | None, *, earlier: bool = False
) -> str:
    return key_of(made_from(data, content, tokenizer_dir, side, code_versions(), earlier=earlier))


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def test_every_input_has_a_key_of_its_own(tmp_path: Path, tokenizer_dir: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(make_tokenizer().chat_template)
    other = tmp_path / "other-tokenizer"
    shutil.copytree(tokenizer_dir, other)
    (other / "chat_template.jinja").write_text(make_tokenizer().chat_template + "{# other #}")
    base = spec_of(tmp_path)
    specs = [
        (base, tokenizer_dir),
        (spec_of(tmp_path, seq_length=64), tokenizer_dir),
        (spec_of(tmp_path, loss_on="all"), tokenizer_dir),
        (spec_of(tmp_path, length_policy="drop"), tokenizer_dir),
        (spec_of(tmp_path, chat_template=str(template)), tokenizer_dir),
        (spec_of(tmp_path, train=base.data.train * 2), tokenizer_dir),
        (base, other),
    ]
    keys = [open_or_build(spec, folder, build=True).train.key for spec, folder in specs]
    assert len(set(keys)) == len(keys)
    write_jsonl(tmp_path / "train.jsonl", make_chat_rows(40, 3))
    assert open_or_build(base, tokenizer_dir, build=True).train.key not in keys


ENDLESS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]


def rows_of(tmp_path: Path, **data: Any) -> RunSpec:
    return spec_of(tmp_path, train=[str(tmp_path / "rows.jsonl")], **data)


def test_settings_that_only_refuse_rows_are_no_part_of_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    """A run may go on with another of them, and data that it would refuse are refused all the same."""
    write_jsonl(tmp_path / "rows.jsonl", ENDLESS)
    lenient = rows_of(tmp_path, require_end_tokens=False)
    key = open_or_build(lenient, tokenizer_dir, build=True).train.key
    for may_build in (True, False):
        with pytest.raises(DataError, match=r"no answer in .* ends with a trained end token"):
            open_or_build(rows_of(tmp_path), tokenizer_dir, build=may_build)
    assert open_or_build(lenient, tokenizer_dir, build=False).train.key == key

    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b", "context": "c"}] * 3)
    lenient = rows_of(tmp_path, ignore_keys=["context", "documents"])
    key = open_or_build(lenient, tokenizer_dir, build=True).train.key
    with pytest.raises(DataError, match="context would be left out of training"):
        open_or_build(rows_of(tmp_path, ignore_keys=["documents"]), tokenizer_dir, build=True)
    assert open_or_build(rows_of(tmp_path, ignore_keys=["context"]), tokenizer_dir, build=True).train.key == key
    assert not list((lenient.cache_dir / "tokens").glob(".*"))

    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    keys = {
        open_or_build(rows_of(tmp_path, **given), tokenizer_dir, build=True).train.key
        for given in ({}, {"ignore_keys": ["context"]}, {"require_end_tokens": False})
    }
    assert len(keys) == 1


def test_a_cache_of_an_earlier_version_keeps_its_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    """Checkpoints name it: with another key a run that an earlier version began would not go on."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    spec = rows_of(tmp_path, ignore_keys=["context"])
    new = open_or_build(spec, tokenizer_dir, build=True).train
    data = dataclasses.replace(spec.data, format="prompt_completion")
    earlier = cache_key(data, [sha256_of(tmp_path / "rows.jsonl")], tokenizer_dir, None, earlier=True)
    assert earlier != new.key
    manifest = json.loads((new.directory / MANIFEST).read_text())
    del manifest["sha256"], manifest["ignored_keys"]
    manifest["key"] = earlier
    write_json(new.directory / MANIFEST, {**manifest, "sha256": _digest(manifest)})
    new.directory.rename(new.directory.with_name(earlier[:40]))
    assert open_or_build(spec, tokenizer_dir, build=True, verify=True).train.key == earlier


@pytest.mark.parametrize("prompt", ["a", [{"role": "user", "content": "a"}]])
def test_a_cache_whose_prompts_an_earlier_version_left_out_is_built_again(
    prompt: object, tmp_path: Path, tokenizer_dir: Path
) -> None:
    """It trained the completions alone with loss_on all; every other cache keeps its key."""
    completion = "b" if prompt == "a" else [{"role": "assistant", "content": "b"}]
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": completion}])
    settings = {"loss_on": "all", "require_end_tokens": False}
    new = open_or_build(rows_of(tmp_path, **settings), tokenizer_dir, build=True).train
    assert new.weights[1:].all()

    content = [sha256_of(tmp_path / "rows.jsonl")]
    whole, answers = (DataSpec(format="prompt_completion", loss_on=chosen) for chosen in ("all", "assistant"))
    assert cache_key(whole, content, tokenizer_dir, None) == new.key
    assert key_of_earlier_version(whole, content, tokenizer_dir) != new.key
    for same in (answers, dataclasses.replace(whole, format="messages"), dataclasses.replace(whole, format="text")):
        assert cache_key(same, content, tokenizer_dir, None) == key_of_earlier_version(same, content, tokenizer_dir)


def test_what_chooses_the_tokenizers_class_is_part_of_the_key(tmp_path: Path) -> None:
    """Seen to train the tokens of another class: a directory with the tokenizer's files alone shared its caches with
    the model's, whose config.json makes transformers split words in another way."""
    alone, with_model = tmp_path / "tokenizer", tmp_path / "model"
    sentencepiece_like().save_pretrained(alone)
    shutil.copytree(alone, with_model)
    (with_model / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 500}')
    spec = spec_of(tmp_path, chat_template="none", train=[str(tmp_path / "rows.jsonl")])
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Hello there,  who", "completion": " are you?"}])
    caches = [open_or_build(spec, folder, build=True).train for folder in (alone, with_model)]
    assert caches[0].ids.tolist() != caches[1].ids.tolist()
    assert caches[0].key != caches[1].key
    (with_model / "config.json").write_text('{"model_type": "qwen2", "vocab_size": 500, "dropout": 0.1}')
    assert open_or_build(spec, with_model, build=True).train.key == caches[1].key


def test_rows_of_a_cache_that_was_made_with_fewer_checks_are_checked_once(
    tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to be trained from the cache, after the upgrade that refuses such rows."""
    spec = rows_of(tmp_path)
    for rows, is_refused in (([{"prompt": "a", "completion": "b"}], False), ([{"messages": CHANNEL}], True)):
        write_jsonl(tmp_path / "rows.jsonl", rows)
        with monkeypatch.context() as before:
            before.setattr(prepare, "CHECKS", 0)
            before.setattr(messages, "refuse_in_turn", lambda *_, **__: None)
            old = open_or_build(spec, tokenizer_dir, build=True).train
        assert old.checks == 0
        if is_refused:
            with pytest.raises(DataError, match="channel would be left out of training"):
                open_or_build(spec, tokenizer_dir, build=True)
            continue
        checked = open_or_build(spec, tokenizer_dir, build=True, verify=True).train
        assert checked.key == old.key
        assert arrays_of(checked) == arrays_of(old)
        with monkeypatch.context() as after:
            after.setattr(prepare, "write_parts", lambda *_, **__: pytest.fail("tokenized again"))
            assert open_or_build(spec, tokenizer_dir, build=True, verify=True).train.checks == prepare.CHECKS


CHANNEL = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hm", "channel": "analysis"}]


def key_of_earlier_version(data: DataSpec, content: list[str], tokenizer_dir: Path) -> str:
    """The key without what tells caches with trained prompts apart."""
    made_from = {
        "code": [CODE_VERSION, FORMAT_VERSION, version("transformers"), version("tokenizers")],
        "data": content,
        "format": data.format,
        "tokenizer": {path.name: sha256_of(path) for path in tokenizer_files(tokenizer_dir)},
        "template": data.chat_template,
        "policies": {name: getattr(data, name) for name in _POLICIES} | _ONLY_REFUSE,
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()


def test_what_does_not_change_tokens_does_not_change_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    spec = spec_of(tmp_path)
    moved = shutil.copy(spec.data.train[0], tmp_path / "moved.jsonl")
    other = spec_of(tmp_path, train=[str(moved)], shuffle=False, pad_to_multiple=64, workers=2)
    keys = [open_or_build(each, tokenizer_dir, build=True).train.key for each in (spec, other)]
    assert keys[0] == keys[1]


def test_policies_that_change_tokens_change_the_key(tmp_path: Path, tokenizer_dir: Path) -> None:
    (tmp_path / "moody.jinja").write_text("{{ mood }}" + CHAT_TEMPLATE)
    template = str(tmp_path / "moody.jinja")
    specs = [
        spec_of(tmp_path, chat_template=template),
        spec_of(tmp_path, chat_template=template, on_mismatch="split"),
        spec_of(tmp_path, chat_template=template, chat_template_kwargs={"mood": "1"}),
    ]
    keys = {open_or_build(spec, tokenizer_dir, build=True).train.key for spec in specs}
    assert len(keys) == 3


OTHER_TOKENS: dict[str, Any] = {
    "format": "text",
    "columns": {"messages": "turns"},
    "chat_template": "chatml",
    "chat_template_kwargs": {"enable_thinking": "true"},
    "date": "2001-02-03",
    "loss_on": "all",
    "on_mismatch": "split",
    "seq_length": 7,
    "length_policy": "drop",
    "validation_split": "3",
}
"""Settings that may change tokens or weights, each with another value than its default."""

SAME_TOKENS: dict[str, Any] = {
    "train": ["moved.jsonl"],  # the bytes of the files are in the key, and not their names
    "sources": {"one": SourceSpec(files=["a.jsonl"], weight=2.0)},  # of_source gives each its own settings
    "validation": ["held-out.jsonl"],
    "validation_sets": {"one": "held-out.jsonl"},
    "hub": None,
    "ignore_keys": ["context"],
    "max_lost_percent": 1.0,
    "require_end_tokens": False,
    "packing": True,
    "pad_to_multiple": 64,
    "group_by_length": True,
    "shuffle": False,
    "cyclic_seed": 1,
    "workers": 3,
    "cache_dir": "elsewhere",
}


def test_each_setting_is_in_the_key_or_changes_no_token(tmp_path: Path) -> None:
    """A setting that is new in the config fails here until somebody has said which it is."""
    assert {field.name for field in dataclasses.fields(DataSpec)} == {*OTHER_TOKENS, *SAME_TOKENS}
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + str(tokenizer.chat_template)
    tokenizer.save_pretrained(tmp_path)
    plain = DataSpec(format="messages", date="2024-07-26", validation_split="2")

    def key(data: DataSpec) -> str:
        return cache_key(data, ["0" * 64], tmp_path, "train")

    changed = {name: key(dataclasses.replace(plain, **{name: value})) for name, value in OTHER_TOKENS.items()}
    assert len({key(plain), *changed.values()}) == len(changed) + 1
    for name, value in SAME_TOKENS.items():
        assert key(dataclasses.replace(plain, **{name: value})) == key(plain), name


@pytest.mark.parametrize(
    "name",
    [
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
        *("added_tokens.json", "additional_chat_templates/tool_use.jinja", "vocab.json", "merges.txt"),
    ],
)
def test_each_file_of_a_tokenizer_is_in_the_key(name: str, tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    before = cache_key(DataSpec(), [], tmp_path, None)
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_text((file.read_text() if file.is_file() else "") + " ")
    assert cache_key(DataSpec(), [], tmp_path, None) != before
