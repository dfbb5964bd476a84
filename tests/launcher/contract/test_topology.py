"""Topology rules, compared with an independent, plain statement of them."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.errors import TopologyError
from launcher.contract.linear_attention import LinearAttention
from launcher.contract.model_shape import ModelShape, named_model_shape
from launcher.contract.spec import DataSpec, Fp8Spec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.topology import build_topology

SMOLLM = ModelShape(
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    tied_embeddings=True,
)

small = st.integers(1, 4)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=draw(st.integers(1, 3)), tasks_per_node=draw(st.integers(1, 6))),
        topology=TopologySpec(
            tensor_parallel=draw(small),
            pipeline_parallel=draw(small),
            virtual_pipeline=draw(st.sampled_from([1, 1, 2, 3])),
            context_parallel=draw(st.sampled_from([1, 1, 2])),
            layers_per_stage=draw(st.just([]) | st.lists(st.integers(1, 4), min_size=1, max_size=4)),
            sequence_parallel=draw(st.booleans()),
        ),
        train=TrainSpec(global_batch_size=draw(st.integers(1, 24)), micro_batch_size=draw(st.integers(1, 3))),
        data=DataSpec(seq_length=draw(st.integers(1, 64))),
    )


shapes = st.builds(
    lambda heads, groups, layers, ffn, positions: dataclasses.replace(
        SMOLLM,
        num_attention_heads=heads * groups,
        num_query_groups=groups,
        num_layers=layers,
        ffn_hidden_size=ffn,
        max_position_embeddings=positions,
    ),
    *(small, small, st.integers(1, 12), st.integers(1, 24), st.integers(16, 64)),
)


def fits(spec: RunSpec, shape: ModelShape) -> bool:
    """The rules as one would write them down."""
    topo, train = spec.topology, spec.train
    given = topo.layers_per_stage
    tp, pp, vpp, cp = topo.tensor_parallel, topo.pipeline_parallel, topo.virtual_pipeline, topo.context_parallel
    world = spec.resources.nodes * spec.resources.ranks_per_node
    if spec.resources.ranks_per_node % tp or world % (tp * pp * cp):
        return False
    data = world // (tp * pp * cp)
    micro_batches, rest = divmod(train.global_batch_size, train.micro_batch_size * data)
    groups = shape.num_query_groups
    return not (
        rest
        or (topo.sequence_parallel and (tp == 1 or spec.data.seq_length % tp))
        or (cp > 1 and spec.data.seq_length % (2 * cp))
        or (cp > 1 and topo.sequence_parallel and spec.data.seq_length % (2 * cp * tp))
        or (vpp > 1 and (pp == 1 or micro_batches % pp))
        or shape.num_attention_heads % tp
        or (groups % tp and tp % groups)
        or shape.num_layers < pp * vpp
        or (given and (len(given) != pp * vpp or sum(given) != shape.num_layers))
        or shape.ffn_hidden_size % tp
        or spec.data.seq_length > shape.max_position_embeddings
    )


@given(specs(), shapes)
def test_accepts_exactly_what_fits(spec: RunSpec, shape: ModelShape) -> None:
    try:
        topology = build_topology(spec, shape)
    except TopologyError as error:
        assert not fits(spec, shape), error
        assert all(error.problems)
    else:
        assert fits(spec, shape)
        sizes = (
            topology.tensor_parallel,
            topology.pipeline_parallel,
            topology.context_parallel,
            topology.data_parallel,
        )
        assert sizes[0] * sizes[1] * sizes[2] * sizes[3] == topology.world_size
        assert topology.micro_batches * topology.micro_batch_size * topology.data_parallel == topology.global_batch_size


@given(specs(), shapes)
def test_nearest_global_batch_sizes_are_valid(spec: RunSpec, shape: ModelShape) -> None:
    try:
        build_topology(spec, shape)
    except TopologyError as error:
        for problem in error.problems:
            match = re.search(r"^train\.global_batch_size .* nearest valid: ([\d, ]+)$", problem)
            for size in map(int, match.group(1).split(",")) if match else ():
                mended = dataclasses.replace(spec, train=dataclasses.replace(spec.train, global_batch_size=size))
                remaining = _problems(mended, shape)
                assert not [text for text in remaining if text.startswith("train.global_batch_size")]


def _problems(spec: RunSpec, shape: ModelShape | None) -> tuple[str, ...]:
    try:
        build_topology(spec, shape)
    except TopologyError as error:
        return error.problems
    return ()


def make(nodes: int = 1, tasks: int = 2, gpus: int = 0, batch: int = 8, **topology: int | bool | list[int]) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=nodes, tasks_per_node=tasks, gpus_per_node=gpus),
        topology=TopologySpec(**topology),  # type: ignore[arg-type]
        train=TrainSpec(global_batch_size=batch),
    )


@pytest.mark.parametrize(
    ("spec", "messages"),
    [
        (make(tensor_parallel=2), ["9 attention heads do not divide by tensor_parallel 2; valid here: 1, 3, 9"]),
        (
            make(tasks=4, pipeline_parallel=4, virtual_pipeline=8),
            [
                "30 layers are fewer than the model chunks of pipeline_parallel 4 x virtual_pipeline 8 = 32, and each "
                "needs one: a stage with nothing but an embedding or output layer is not supported; at most 30 chunks "
                "here"
            ],
        ),
        (
            make(tasks=4, pipeline_parallel=4, layers_per_stage=[8, 8, 8]),
            [
                "topology.layers_per_stage has 3 numbers; it needs one for each model chunk: pipeline_parallel 4",
                "topology.layers_per_stage: 8 + 8 + 8 = 24 layers, and the model has 30; leave it out to have them "
                "balanced by cost",
            ],
        ),
        (
            make(tasks=2, pipeline_parallel=2, layers_per_stage=[30, 0]),
            ["topology.layers_per_stage: 0 is not at least 1"],
        ),
        (
            make(tasks=3, batch=8),
            [
                "train.global_batch_size 8 does not divide by micro_batch_size 1 x data_parallel 3 = 3; "
                "nearest valid: 6, 9"
            ],
        ),
        (
            make(nodes=3, tasks=1, pipeline_parallel=2),
            [
                "3 ranks (3 nodes x 1) do not divide by tensor_parallel 1 x pipeline_parallel 2 x context_parallel 1 "
                "= 2; nearest valid numbers of ranks: 2, 4"
            ],
        ),
        (
            make(nodes=3, tasks=1, tensor_parallel=3),
            [
                "topology.tensor_parallel 3 does not divide the 1 ranks of a node, and tensor parallel must not cross "
                "nodes; valid here: 1"
            ],
        ),
        (
            make(sequence_parallel=True, virtual_pipeline=2),
            [
                "topology.sequence_parallel needs tensor_parallel > 1; set it to false",
                "topology.virtual_pipeline 2 needs pipeline_parallel > 1; set it to 1",
            ],
        ),
        (
            make(tasks=2, pipeline_parallel=2, virtual_pipeline=3, batch=3),
            [
                "topology.virtual_pipeline 3 needs the micro-batches of a step to be a multiple of pipeline_parallel "
                "2, and there are 3 (global_batch_size 3 / (micro_batch_size 1 x data_parallel 1)); "
                "nearest valid global_batch_size: 2, 4"
            ],
        ),
        (
            make(tensor_parallel=0, tasks=0),
            [
                "resources.tasks_per_node: 0 is not at least 1",
                "topology.tensor_parallel: 0 is not at least 1",
            ],
        ),
        (
            make(tasks=2, gpus=4),
            [
                "resources.tasks_per_node is 2 on nodes with 4 GPUs; each rank drives one GPU, so leave tasks_per_node "
                "out or set it to 4"
            ],
        ),
    ],
)
def test_messages(spec: RunSpec, messages: list[str]) -> None:
    assert list(_problems(spec, SMOLLM)) == messages


def test_model_that_cannot_be_read_here_is_left_to_the_ranks() -> None:
    assert build_topology(make(tensor_parallel=2), None).tensor_parallel == 2


def test_descriptions() -> None:
    assert build_topology(make(tasks=1), None).describe() == "dp1 = 1 ranks"
    layout = make(nodes=2, tasks=4, tensor_parallel=2, pipeline_parallel=2, sequence_parallel=True)
    assert build_topology(layout, None).describe() == "tp2 x pp2 x dp2 = 8 ranks + sequence parallel"


def test_fp8_needs_sides_of_sixteens() -> None:
    """The library's rule for weights; said before the queue."""
    shape = dataclasses.replace(SMOLLM, ffn_hidden_size=1544)
    spec = make(tasks=1)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, precision="fp8"))
    assert build_topology(spec, SMOLLM).world_size == 1
    with pytest.raises(TopologyError) as caught:
        build_topology(spec, shape)
    assert list(caught.value.problems) == [
        "train.precision fp8 needs multiples of 16, and feed-forward size on a rank of tensor_parallel 1 is 1544; "
        "set train.precision to bf16, or another tensor_parallel"
    ]


def test_latent_attention_is_not_in_fp8() -> None:
    spec, shape = make(tasks=1), named_model_shape("16b-a3b")
    assert build_topology(spec, shape).world_size == 1
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, precision="fp8"))
    with pytest.raises(TopologyError) as caught:
        build_topology(spec, shape)
    assert list(caught.value.problems) == [
        "train.precision fp8: a deepseek_v3 model's latent attention has no products in fp8 here; set train.precision "
        "to bf16"
    ]


def test_experts_in_fp8_need_some_of_sides_of_sixteens() -> None:
    spec = make(tasks=2, tensor_parallel=2)
    train = dataclasses.replace(spec.train, precision="fp8", fp8=Fp8Spec(experts=True))
    spec, shape = dataclasses.replace(spec, train=train), named_model_shape("30b-a3b")
    assert build_topology(spec, shape).world_size == 2
    for other, problem in (
        (SMOLLM, "train.fp8.experts: a llama model has no experts; drop it"),
        (dataclasses.replace(shape, expert_ffn_hidden_size=720), "an expert's width on a rank is 360; set it to false"),
    ):
        with pytest.raises(TopologyError, match=problem):
            build_topology(spec, other)


def test_norms_are_computed_again_where_there_are_some_before_products() -> None:
    """Olmo 2 and 3 have them behind attention and MLP. Seen to train without a word, in the memory of none."""
    shape, spec = dataclasses.replace(SMOLLM, model_type="olmo2", norms_first=False), make(tasks=1)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, recompute="norms"))
    assert build_topology(spec, SMOLLM).world_size == 1
    with pytest.raises(TopologyError, match="norms: olmo2 has no norms before attention and MLP"):
        build_topology(spec, shape)


def test_no_more_layers_are_computed_again_than_a_stage_has() -> None:
    shape, spec = dataclasses.replace(SMOLLM, num_layers=8), make(tasks=2, pipeline_parallel=2)

    def again(layers: int) -> RunSpec:
        train = dataclasses.replace(spec.train, recompute="full", recompute_layers=layers)
        return dataclasses.replace(spec, train=train)

    most = max(build_topology(again(1), shape).layers_per_stage)
    assert build_topology(again(most), shape).world_size == 2
    with pytest.raises(TopologyError, match=f"recompute_layers {most + 1}: no pipeline stage has more than {most} lay"):
        build_topology(again(most + 1), shape)


def test_graphs_that_must_be_are_refused_before_a_run_waits_for_its_ranks() -> None:
    """Whether the model's layers can be graphs is known with its shape."""
    spec = make(tasks=1)
    spec = dataclasses.replace(spec, train=dataclasses.replace(spec.train, cuda_graphs="always", precision="bf16"))
    assert build_topology(spec, named_model_shape("1b")).world_size == 1
    with pytest.raises(TopologyError, match=r"train.cuda_graphs always: graphs are not made for this run \(experts\)"):
        build_topology(spec, named_model_shape("30b-a3b"))


def test_some_layer_is_in_fp8() -> None:
    shape = dataclasses.replace(SMOLLM, num_layers=4)

    def train(first: int, last: int) -> RunSpec:
        spec = make(tasks=1)
        fp8 = Fp8Spec(bf16_first_layers=first, bf16_last_layers=last)
        return dataclasses.replace(spec, train=dataclasses.replace(spec.train, precision="fp8", fp8=fp8))

    assert build_topology(train(2, 1), shape).world_size == 1
    with pytest.raises(TopologyError, match="first_layers 2 \\+ bf16_last_layers 2 = 4 leave none of the 4 layers"):
        build_topology(train(2, 2), shape)


def test_heads_of_linear_attention_are_shared_evenly() -> None:
    """By tensor parallel ranks, and among them by those that share rows."""
    sizes = LinearAttention(key_heads=6, value_heads=12, key_dim=8, value_dim=8, kernel=4)
    shape = dataclasses.replace(
        SMOLLM, num_attention_heads=12, num_query_groups=12, linear=sizes, linear_layers=(0, 1), num_layers=4
    )

    def problems(tensor: int, context: int = 1) -> list[str]:
        spec = RunSpec(
            resources=ResourcesSpec(tasks_per_node=tensor * context),
            topology=TopologySpec(tensor_parallel=tensor, context_parallel=context),
            data=DataSpec(seq_length=48),
            train=TrainSpec(global_batch_size=4),
        )
        try:
            build_topology(spec, shape)
        except TopologyError as error:
            return list(error.problems)
        return []

    assert not problems(3) and not problems(3, 2) and not problems(1, 6)
    assert problems(4) == ["6 key heads of linear attention do not divide by tensor_parallel 4; valid here: 1, 2, 3, 6"]
    assert problems(3, 4) == [
        "6 key heads of linear attention do not divide by tensor_parallel 3 x context_parallel 4 = 12; valid "
        "context_parallel here: 1, 2"
    ]
