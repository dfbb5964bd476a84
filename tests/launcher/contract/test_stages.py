"""How layers are shared out over model chunks: the best of all splits, and the same one everywhere."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.stages import balanced_split, chunk_ranges, even_split, split_by_cost
from launcher.contract.topology import Topology, build_topology


def all_splits(layers: int, chunks: int) -> list[tuple[int, ...]]:
    """Every way to give each chunk a layer at least."""
    found = []
    for ends in itertools.combinations(range(1, layers), chunks - 1):
        bounds = [0, *ends, layers]
        found.append(tuple(end - start for start, end in itertools.pairwise(bounds)))
    return found


def chunk_costs(split: tuple[int, ...], costs: list[int], head: int, recomputed: int) -> list[int]:
    """In thirds of a layer's cost, of which its forward pass is one."""
    found = [
        sum(3 * costs[layer] for layer in layers) + sum(costs[layer] for layer in layers[:recomputed])
        for layers in chunk_ranges(split)
    ]
    found[-1] += 3 * head
    return found


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(0, 24), st.integers(0, 8), st.data())
def test_no_split_is_better(costs: list[int], head: int, recomputed: int, data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    virtual = data.draw(st.integers(1, len(costs) // stages))

    def order(split: tuple[int, ...]) -> tuple[int, int, int, tuple[int, ...]]:
        by_chunk = chunk_costs(split, costs, head, recomputed)
        return max(by_chunk), sum(cost * cost for cost in by_chunk), sum(by_chunk[stages - 1 :: stages]), split

    best = min(all_splits(len(costs), stages * virtual), key=order)
    assert split_by_cost(tuple(costs), head, stages, virtual, recomputed) == best


def test_even_splits() -> None:
    assert even_split(32, 4) == (8, 8, 8, 8)
    assert even_split(30, 4) == even_split(0, 0) == ()


def spec(stages: int, virtual: int = 1, *, recompute: str = "none", length: int = 4096, gpus: int = 0) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=1, tasks_per_node=stages, gpus_per_node=gpus),
        data=DataSpec(seq_length=length),
        topology=TopologySpec(pipeline_parallel=stages, virtual_pipeline=virtual),
        train=TrainSpec(global_batch_size=4 * stages, recompute=recompute),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("model", "stages", "virtual", "split"),
    [
        # The output layer of 8B costs as much as 2.2 layers, that of 70B as 1.2.
        ("8b", 1, 1, (32,)),
        ("8b", 2, 1, (17, 15)),
        ("8b", 4, 1, (8, 9, 9, 6)),
        ("8b", 4, 2, (4, 4, 4, 4, 4, 5, 5, 2)),
        ("70b", 4, 20, (1,) * 80),
    ],
)
def test_balance_of_published_models(model: str, stages: int, virtual: int, split: tuple[int, ...]) -> None:
    assert balanced_split(spec(stages, virtual), named_model_shape(model)) == split


def test_any_number_of_layers_goes_with_any_number_of_stages() -> None:
    """94 layers with pp 8, and 3 with pp 2, of a model whose output layer costs 2 layers."""
    shape = dataclasses.replace(named_model_shape("8b"), num_layers=94)
    topology = build_topology(spec(8), shape)
    assert topology.layers_per_stage == (12, 12, 12, 12, 12, 12, 12, 10)
    assert build_topology(spec(2), dataclasses.replace(shape, num_layers=3)).layers_per_stage == (2, 1)


def test_layers_in_fp8_make_the_output_layer_dearer() -> None:
    """The output layer is in bf16 always."""
    shape, run = named_model_shape("1b"), spec(2)
    in_fp8 = dataclasses.replace(run, train=dataclasses.replace(run.train, precision="fp8"))
    assert balanced_split(run, shape) == (10, 6)
    assert balanced_split(in_fp8, shape) == (11, 5)


def test_recomputed_layers_and_long_rows_make_the_output_layer_cheaper() -> None:
    shape = named_model_shape("8b")
    assert balanced_split(spec(4), shape)[-1] < balanced_split(spec(4, length=131_072), shape)[-1]
    costs = [balanced_split(spec(8, recompute=recompute), shape)[-1] for recompute in ("none", "full")]
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("layers", "split"), [(1, (8, 9, 9, 6)), (6, (9, 9, 9, 5)), (9, (8, 8, 9, 7)), (None, (8, 8, 9, 7))]
)
def test_of_a_stage_only_layers_that_are_recomputed_cost_more(layers: int | None, split: tuple[int, ...]) -> None:
    """The last stage of 8B has fewer layers, and more of them recomputed, until all are."""
    run = spec(4, recompute="full")
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, recompute_layers=layers))
    assert balanced_split(run, named_model_shape("8b")) == split


def test_layers_with_a_window_cost_less_in_long_rows() -> None:
    """Of a model whose first half sees 4,096 positions, that half has more layers."""
    windowed = dataclasses.replace(named_model_shape("8b"), window=4096, windowed_layers=tuple(range(16)))
    assert balanced_split(spec(2), windowed) == balanced_split(spec(2), named_model_shape("8b")) == (17, 15)
    assert balanced_split(spec(2, length=131_072), windowed)[0] > 20


def test_dense_layers_of_a_model_with_experts_have_their_own_cost() -> None:
    """A dense layer of GLM-4.5-Air computes as much as an expert layer; one that is far wider counts for more."""
    shape = named_model_shape("106b-a12b")
    wide = dataclasses.replace(shape, ffn_hidden_size=40 * shape.ffn_hidden_size)
    assert balanced_split(spec(4), wide)[0] < balanced_split(spec(4), shape)[0]


def test_layers_of_a_stage_and_their_description() -> None:
    topology = Topology(
        world_size=2,
        ranks_per_node=2,
        tensor_parallel=1,
        pipeline_parallel=2,
        virtual_pipeline=2,
        context_parallel=1,
        data_parallel=1,
        sequence_parallel=False,
        micro_batch_size=1,
        global_batch_size=2,
        expert_parallel=1,
        expert_tensor_parallel=1,
        layers_per_stage=(2, 1, 1, 3),
    )
    assert topology.layers_of(0) == (range(2), range(3, 4))
    assert topology.layers_of(1) == (range(2, 3), range(4, 7))
    assert topology.describe_stages() == "2+1, 1+3 layers"
