"""Rules about what a step contains (packing, units of the batch, length grouping), and how a batch is described."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.contract.config.checks import spec_problems
from launcher.contract.errors import TopologyError
from launcher.contract.spec import DataSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.topology import build_topology, describe_batch


def spec_of(ranks: int = 1, virtual: bool = False, **settings: Any) -> RunSpec:
    """A config with these settings of data and train."""
    names = {field.name for field in dataclasses.fields(DataSpec)}
    data = {name: value for name, value in settings.items() if name in names}
    train = {name: value for name, value in settings.items() if name not in names}
    return RunSpec(
        name="run",
        resources=ResourcesSpec(tasks_per_node=ranks),
        topology=TopologySpec(pipeline_parallel=2, virtual_pipeline=2) if virtual else TopologySpec(),
        data=DataSpec(train=["chat.jsonl"], **data),
        train=TrainSpec(**{"max_steps": 1, **train}),
    )


@pytest.mark.parametrize(
    ("settings", "key", "message"),
    [
        (
            {"global_batch_unit": "tokens", "global_batch_size": 2500},
            "train.global_batch_size",
            "2500 tokens are not a number of rows of data.seq_length 1024; nearest valid: 2048, 3072",
        ),
        (
            {"global_batch_unit": "tokens", "global_batch_size": 8},
            "train.global_batch_size",
            "8 tokens are not a number of rows of data.seq_length 1024; nearest valid: 1024",
        ),
        ({"group_by_length": True, "packing": True}, "data.group_by_length", "excludes data.packing"),
        ({"group_by_length": True, "shuffle": False}, "data.group_by_length", "excludes data.shuffle false"),
        (
            {"group_by_length": True, "global_batch_unit": "tokens", "global_batch_size": 1024},
            "data.group_by_length",
            "excludes train.global_batch_unit tokens",
        ),
        ({"cyclic_seed": 1000, "group_by_length": True}, "data.cyclic_seed", "excludes data.group_by_length"),
        ({"cyclic_seed": 1000, "shuffle": False}, "data.cyclic_seed", "excludes data.shuffle false"),
        (
            {"cyclic_seed": 1000, "max_steps": None, "epochs": 2},
            "data.cyclic_seed",
            "excludes train.epochs; give train.max_steps",
        ),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], key: str, message: str) -> None:
    problems = [text for where, text in spec_problems(spec_of(**settings)) if where == key]
    assert len(problems) == 1
    assert message in problems[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"packing": True},
        {"packing": True, "micro_batch_size": 2},
        {"group_by_length": True},
        {"packing": True, "global_batch_unit": "tokens", "global_batch_size": 4096},
        {"global_batch_unit": "tokens", "global_batch_size": 4096, "micro_batch_size": 2},
    ],
)
def test_settings_that_do(settings: dict[str, Any]) -> None:
    keys = {"train.micro_batch_size", "train.global_batch_size", "data.group_by_length"}
    assert not keys & {where for where, _ in spec_problems(spec_of(**settings))}


@pytest.mark.parametrize(("ranks", "virtual"), [(3, False), (2, True)])
def test_batches_whose_micro_batches_vary_need_not_divide(ranks: int, virtual: bool) -> None:
    """Ranks get equally many in any case, some of them empty."""
    with pytest.raises(TopologyError, match="global_batch_size"):
        build_topology(spec_of(ranks, virtual, global_batch_size=7), None)
    topology = build_topology(spec_of(ranks, virtual, global_batch_size=7, packing=True), None)
    assert topology.micro_batch_multiple == (2 if virtual else 1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "8 examples a step = micro-batch 1 x dp 2 x 4 accumulated; at most 8,192 tokens"),
        (
            {"packing": True},
            "8 examples a step packed into rows of at most 1,024 tokens over dp 2; at most 8,192 tokens",
        ),
        (
            {"packing": True, "global_batch_unit": "tokens", "global_batch_size": 4096},
            "4,096 tokens a step packed into rows of at most 1,024 tokens over dp 2",
        ),
        (
            {"global_batch_unit": "tokens", "global_batch_size": 4096, "micro_batch_size": 2},
            "4,096 tokens a step in micro-batches of 2 over dp 2",
        ),
    ],
)
def test_what_a_step_holds_in_words(settings: dict[str, Any], words: str) -> None:
    spec = spec_of(2, **settings)
    assert describe_batch(spec, build_topology(spec, None)) == words
