"""From a config to steps: which schedule, how many steps, and what makes two sequences of batches the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sft.training.datamodule
from launcher.contract.spec import DataSpec, RunSpec, TrainSpec
from launcher.contract.topology import Topology, build_topology
from sft.data.batches.sampler import ExampleSchedule, TokenSchedule
from sft.data.cache.store import TokenCache
from sft.data.prepared.prepare import PreparedData
from sft.data.prepared.schedule import batch_schedule
from sft.training.datamodule import SFTDataModule, StepBatches
from tests.sft.caches_for_tests import make_cache, ragged_pairs


@pytest.fixture
def cache(tmp_path: Path) -> TokenCache:
    return make_cache(tmp_path / "cache", ragged_pairs(50))


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process stands in for data parallel rank 0."""
    groups = SimpleNamespace(get_data_parallel_rank=lambda: 0)
    monkeypatch.setattr(sft.training.datamodule, "parallel_state", groups)


def spec_of(**settings: Any) -> RunSpec:
    """A config with these settings of data and train."""
    names = {field.name for field in dataclasses.fields(DataSpec)}
    data = {name: value for name, value in settings.items() if name in names}
    train = {"epochs": 2, **{name: value for name, value in settings.items() if name not in names}}
    return RunSpec(data=DataSpec(**{"seq_length": 32, **data}), train=TrainSpec(**train))


def module_of(cache: TokenCache, validation: TokenCache | None = None, **settings: Any) -> SFTDataModule:
    spec = spec_of(**settings)
    return SFTDataModule(spec, topology_of(spec), PreparedData(train=cache, validation=validation))


def topology_of(spec: RunSpec) -> Topology:
    return build_topology(spec, None)


def test_steps_of_a_run(cache: TokenCache) -> None:
    assert module_of(cache).max_steps == 2 * 7
    assert module_of(cache, epochs=None, max_steps=5).max_steps == 5
    rows = -(-int((cache.lengths - 1).sum()) // 32)
    steps = module_of(cache, global_batch_unit="tokens", global_batch_size=64).max_steps
    assert 2 * -(-rows // 2) <= steps <= 2 * -(-(rows + 1) // 2)


def test_trap_20_the_unit_decides_the_plan_and_packing_does_not(cache: TokenCache) -> None:
    """Seen to fail with packing that implies the unit tokens."""
    tokens = {"global_batch_unit": "tokens", "global_batch_size": 64}
    for packing in (False, True):
        assert isinstance(batch_schedule(spec_of(packing=packing), cache, shuffle=True), ExampleSchedule)
        schedule = batch_schedule(spec_of(packing=packing, **tokens), cache, shuffle=True)
        assert isinstance(schedule, TokenSchedule)
        assert (schedule.rows_per_step, schedule.row_length) == (2, 32)
        assert np.array_equal(schedule.lengths, cache.lengths - 1)


@pytest.mark.parametrize(
    "change",
    [
        {"packing": True},
        {"packing": True, "seq_length": 64},
        {"global_batch_unit": "tokens", "global_batch_size": 32},
        {"global_batch_unit": "tokens", "global_batch_size": 64},
        {"group_by_length": True},
        {"global_batch_size": 4},
        {"seed": 1},
        {"shuffle": False},
    ],
    ids=str,
)
def test_trap_16_whatever_changes_the_batches_changes_their_key(change: dict[str, Any], cache: TokenCache) -> None:
    """Seen to fail with a key that leaves packing, or the unit, out."""
    assert module_of(cache, **change).data_key != module_of(cache).data_key


def test_trap_16_what_does_not_change_the_batches_leaves_their_key(cache: TokenCache) -> None:
    """Padding, length of the run and layout. The order is the same on every topology, and so is the key."""
    assert module_of(cache, pad_to_multiple=64, epochs=9, micro_batch_size=2).data_key == module_of(cache).data_key


@pytest.mark.usefixtures("first_rank")
@pytest.mark.parametrize("settings", [{}, {"global_batch_unit": "tokens", "global_batch_size": 64}], ids=str)
@pytest.mark.parametrize("packing", [False, True])
def test_trap_19_held_out_examples_come_once(
    packing: bool, settings: dict[str, Any], cache: TokenCache, tmp_path: Path
) -> None:
    """Seen to fail with the last short batch left out."""
    held_out = make_cache(tmp_path / "held_out", ragged_pairs(13, seed=1))
    batches = module_of(cache, held_out, packing=packing, **settings).validation_batches()
    assert isinstance(batches, StepBatches)
    steps = [batches[step] for step in range(len(batches))]
    assert sum(step.examples for step in steps) == 13
    assert sum(step.global_weight for step in steps) == held_out.target_weights.sum()
    assert all((micro.cu_seqlens is not None) == packing for step in steps for micro in step.micro_batches)


def test_without_held_out_data_there_is_nothing_to_evaluate(cache: TokenCache) -> None:
    assert module_of(cache).validation_batches() is None


@pytest.mark.usefixtures("first_rank")
def test_groups_of_similar_lengths_need_less_padding(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "long", ragged_pairs(400, longest=100))
    spans = {}
    for grouped in (False, True):
        spec = spec_of(group_by_length=grouped, seq_length=128, pad_to_multiple=1)
        schedule = batch_schedule(spec, cache, shuffle=True)
        batches = StepBatches(cache, schedule, spec, topology_of(spec), schedule.steps_per_epoch)
        steps = [batches[step] for step in range(schedule.steps_per_epoch)]
        places = sum(micro.tokens.numel() for step in steps for micro in step.micro_batches)
        spans[grouped] = sum(step.tokens for step in steps) / places
    assert spans[True] > 0.95 > 0.65 > spans[False]
