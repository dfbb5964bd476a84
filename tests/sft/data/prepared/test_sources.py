"""Several sources from files to steps: a cache each, one numbering, what is printed, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec, LoggingSpec, RunSpec, SourceSpec, TrainSpec
from launcher.contract.topology import build_topology
from sft.checkpoint.same_run import differences
from sft.data.audit.audit import audit_data, summary
from sft.data.batches.batch import RankShare, collate
from sft.data.batches.mixture import Share
from sft.data.batches.sampler import ExampleSchedule
from sft.data.prepared import prepare
from sft.data.prepared.prepare import PreparedData, check_vocabulary, open_or_build, prepare_data
from sft.data.prepared.sources import Sources
from sft.training.datamodule import SFTDataModule
from tests.sft.caches_for_tests import make_cache, ragged_pairs
from tests.tiny_model import make_chat_rows, make_tokenizer, write_jsonl


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(path)
    return path


def spec_of(tmp_path: Path, weight: float = 2.5, train: dict[str, Any] | None = None, **math: Any) -> RunSpec:
    """Chat of 20 rows, and math of 7 questions with `weight`."""
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(20, 1))
    rows = [{"question": f"{n} and {n}?", "completion": str(2 * n)} for n in range(7)]
    pairs = write_jsonl(tmp_path / "math.jsonl", rows)
    sources = {
        "chat": SourceSpec(files=[str(chat)]),
        "math": SourceSpec(**{"files": [str(pairs)], "weight": weight, "columns": {"prompt": "question"}, **math}),
    }
    data = DataSpec(sources=sources, cache_dir=str(tmp_path / "cache"), workers=1, seq_length=256)
    return RunSpec(
        data=data, train=TrainSpec(**{"epochs": 2, **(train or {})}), logging=LoggingSpec(progress_bar=False)
    )


def sources_of(spec: RunSpec, tokenizer_dir: Path) -> Sources:
    train = open_or_build(spec, tokenizer_dir, build=True).train
    assert isinstance(train, Sources)
    return train


def small_sources(tmp_path: Path) -> Sources:
    caches = [make_cache(tmp_path / str(seed), ragged_pairs(count, seed)) for seed, count in enumerate((5, 1, 4))]
    shares = [Share(name=name, weight=1.5, examples=len(cache)) for name, cache in zip("abc", caches, strict=True)]
    return Sources(tuple(caches), tuple(shares))


def test_examples_are_numbered_source_after_source(tmp_path: Path) -> None:
    joined = small_sources(tmp_path)
    places = [(source, local) for source, cache in enumerate(joined.caches) for local in range(len(cache))]
    assert [joined.locate(example) for example in range(len(joined))] == places
    for example, (source, local) in enumerate(places):
        cache = joined.caches[source]
        assert np.array_equal(joined.tokens(example)[0], cache.tokens(local)[0])
        assert joined.lengths[example] == cache.lengths[local]
        assert joined.target_weights[example] == cache.target_weights[local]
        assert joined.supervised[example] == cache.supervised[local]
    assert joined.id_of(6) == "c:0"


def test_a_batch_of_several_sources(tmp_path: Path) -> None:
    """The numbers of the global batch are those of its examples, wherever they come from."""
    joined = small_sources(tmp_path)
    schedule = ExampleSchedule(num_examples=10, global_batch_size=10, seed=1, shuffle=True)
    batch = collate(joined, schedule, 0, RankShare(dp_rank=0, dp_size=1, micro_batch_size=10))
    assert batch.global_weight == sum(cache.target_weights.sum() for cache in joined.caches)
    assert batch.supervised_tokens == sum(cache.counts.supervised_tokens for cache in joined.caches)
    rows = [int(np.count_nonzero(row)) for row in batch.micro_batches[0].loss_weights.numpy()]
    assert rows == joined.supervised[schedule.examples_at(0)].tolist()


def test_each_source_is_read_in_its_own_way(tmp_path: Path, tokenizer_dir: Path) -> None:
    chat, math = sources_of(spec_of(tmp_path), tokenizer_dir).caches
    _, whole = sources_of(spec_of(tmp_path, loss_on="all"), tokenizer_dir).caches
    assert (len(chat), len(math)) == (20, 7)
    assert whole.counts.supervised_tokens > math.counts.supervised_tokens
    text = make_tokenizer().decode(math.tokens(3)[0])
    assert "3 and 3?" in text
    assert "6" in text


def test_a_source_is_tokenized_once(tmp_path: Path, tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other weights, other names and other mixtures find the caches; so does data.train of the same files."""
    spec = spec_of(tmp_path)
    keys = [cache.key for cache in sources_of(spec, tokenizer_dir).caches]
    monkeypatch.setattr(prepare, "write_parts", lambda *_, **__: pytest.fail("tokenized again"))
    assert [cache.key for cache in sources_of(spec_of(tmp_path, 0.5), tokenizer_dir).caches] == keys
    alone = RunSpec(data=DataSpec(train=spec.data.sources["chat"].files, cache_dir=spec.data.cache_dir, seq_length=256))
    train = open_or_build(alone, tokenizer_dir, build=True).train
    assert not isinstance(train, Sources)
    assert train.key == keys[0]


def test_prepare_prints_what_an_epoch_takes(
    tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepared = prepare_data(spec_of(tmp_path), tokenizer_dir)
    chat, math = prepared.training_caches
    mine = 18 * math.counts.supervised_tokens / 7
    share = chat.counts.supervised_tokens / (chat.counts.supervised_tokens + mine)
    printed = capsys.readouterr().out
    assert "chat: 20 examples" in printed
    assert "math: 7 examples" in printed
    assert (
        "an epoch takes 38 examples of 2 sources:\n"
        "  chat: 20 examples, weight 1 of 20 (1 x 20); 52.6% of the examples, "
        f"{share:.1%} of the trained tokens\n"
        "  math: 18 examples, weight 2.5 of 7 (2 x 7 + 4); 47.4% of the examples, "
        f"{1 - share:.1%} of the trained tokens\n"
    ) in printed


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"weight": 0.07},
            "data.sources.math.weight: 0.07 x 7 examples is 0.49, which rounds to 0: nothing of it would be trained. "
            "Give it at least 1 / (2 x 7) = 0.0714, or remove the source",
        ),
        ({"files": ["/no/such"]}, "data.sources.math: no file '/no/such'"),
        ({"columns": {"promt": "q"}}, "data.sources.math.columns: unknown name 'promt'; did you mean 'prompt'?"),
        ({"columns": {"prompt": "asked"}}, "math.jsonl:1: no format fits the keys 'question', 'com"),
        ({"format": "messages"}, "math.jsonl:1: no key 'messages'; found 'question', 'completion'"),
    ],
)
def test_what_is_refused_names_the_source(
    settings: dict[str, Any], message: str, tmp_path: Path, tokenizer_dir: Path
) -> None:
    with pytest.raises(DataError) as caught:
        open_or_build(spec_of(tmp_path, **settings), tokenizer_dir, build=True)
    assert message in str(caught.value)


def test_ids_without_an_embedding_name_the_source(tmp_path: Path, tokenizer_dir: Path) -> None:
    prepared = open_or_build(spec_of(tmp_path), tokenizer_dir, build=True)
    with pytest.raises(DataError, match=r"data\.sources\.chat: token id \d+ is not in the model's vocabulary of 5 "):
        check_vocabulary(prepared, 5)


def test_the_audit_looks_at_each_source(tmp_path: Path, tokenizer_dir: Path) -> None:
    """An example of one source is doubled in another below it, and held-out ones are looked for in both."""
    spec = spec_of(tmp_path)
    rows = make_chat_rows(20, 1)
    more = SourceSpec(files=[str(write_jsonl(tmp_path / "more.jsonl", [rows[3], *make_chat_rows(2, 9), rows[3]]))])
    held_out = write_jsonl(tmp_path / "held-out.jsonl", [rows[0], *make_chat_rows(2, 9)])
    data = replace(spec.data, sources={**spec.data.sources, "more": more}, validation=[str(held_out)])
    audits = {audit.name: audit for audit in audit_data(replace(spec, data=data), tokenizer_dir)}
    assert list(audits) == ["chat", "math", "more", "validation"]
    assert [audit.duplicates for audit in audits.values()] == [0, 0, 2, 0]
    assert audits["validation"].held_out_in_train == 3
    assert audits["math"].roles["assistant"][1] == audits["math"].cache.counts.supervised_tokens
    assert summary(audits["math"])[0].startswith("  epoch: 18 examples, weight 2.5 of 7 (2 x 7 + 4); ")
    assert not audits["validation"].epoch


def module_of(sources: Sources, spec: RunSpec) -> SFTDataModule:
    return SFTDataModule(spec, build_topology(spec, None), PreparedData(sources, None))


@pytest.mark.parametrize(("unit", "size"), [("examples", 3), ("tokens", 32)])
def test_epochs_are_counted_in_what_they_take(unit: str, size: int, tmp_path: Path) -> None:
    """Counted in tokens their steps differ. Seen to fail with three times those of the first."""
    joined = small_sources(tmp_path)
    data, train = DataSpec(seq_length=32), {"global_batch_unit": unit, "global_batch_size": size}
    module = module_of(joined, RunSpec(data=data, train=TrainSpec(epochs=3, **train)))
    taken = sum(share.taken for share in joined.shares)
    assert taken == 8 + 2 + 6
    assert module.schedule.consumed_examples(module.max_steps) == 3 * taken
    assert module.schedule.consumed_examples(module.max_steps - 1) < 3 * taken
    assert (module.max_steps == 3 * module.schedule.steps_per_epoch) == (unit == "examples")


def test_records_name_the_source_of_an_example(tmp_path: Path, tokenizer_dir: Path) -> None:
    spec = spec_of(tmp_path, train={"global_batch_size": 38})
    found = module_of(sources_of(spec, tokenizer_dir), spec).example_ids(0)
    assert sorted(found)[:20] == sorted(f"chat:{n}" for n in range(20))
    assert {str(name).partition(":")[0] for name in sorted(found)[20:]} == {"math"}


def test_a_refused_resume_names_what_changed(tmp_path: Path, tokenizer_dir: Path) -> None:
    """As it is read back from JSON."""
    before, weight, seed, single = (
        json.loads(json.dumps(module_of(sources_of(spec, tokenizer_dir), spec).data_key))
        for spec in (
            spec_of(tmp_path),
            spec_of(tmp_path, 0.5),
            spec_of(tmp_path, train={"seed": 2}),
            spec_of(tmp_path, loss_on="all"),
        )
    )
    assert differences(before, before) == ""
    assert differences(before, weight) == "data.sources.math.weight was 2.5, is 0.5"
    assert differences(before, seed) == "train.seed was 1234, is 2"
    key = before["data.sources.math"]
    other = single["data.sources.math"]
    told = f"data.sources.math was {key[:19]}, is {other[:19]} (the files, or what decides on their tokens: "
    assert differences(before, single).startswith(told)
    assert "data.loss_on" in differences(before, single)
    without = {name: value for name, value in before.items() if name != "data.sources.math.weight"}
    assert differences(before, without) == "data.sources.math.weight was 2.5, is unset"
