"""The cost model: compared with measured rows, its invariants, and the commands that use it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.__main__ import main
from launcher.contract.cost_model.assumptions import implementation_of, workload_of
from launcher.contract.cost_model.implementation import CURRENT, FUSED, PAIR_RATE, PLAIN
from launcher.contract.cost_model.layer_kinds import LayerKind
from launcher.contract.cost_model.memory import (
    EXPERT_IMBALANCE,
    chunks_in_flight,
    largest_stage,
    layer_activation_bytes,
    pipeline_memory,
)
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.cost_model.products import layer_products
from launcher.contract.cost_model.step_time import StepTime
from launcher.contract.cost_model.workload import (
    Layout,
    Recompute,
    Workload,
    stage_expert_parameters,
    stage_parameters,
    trained_parameters,
)
from launcher.contract.exit_codes import ExitCode
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, LoraSpec, ModelSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.stages import even_split
from launcher.contract.topology import Topology, build_topology
from launcher.planning.run_plan import override_words, run_cost
from launcher.planning.search import HEADROOM, search_layouts, with_gpus
from launcher.planning.variants import with_layout

H100 = gpu_kind("h100")


def run(nodes: int = 2, gpus: int = 8, batch: int = 128, length: int = 4096, **train: object) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=nodes, gpus_per_node=gpus),
        data=DataSpec(seq_length=length),
        train=TrainSpec(global_batch_size=batch, max_steps=100, **train),  # type: ignore[arg-type]
    )


def test_every_layout_keeps_the_rules_and_the_memory() -> None:
    shape = named_model_shape("8b")
    result = search_layouts(run(), shape, H100)
    assert len(result.fitting) > 50
    assert [found.tokens_per_second for found in result.fitting] == sorted(
        (found.tokens_per_second for found in result.fitting), reverse=True
    )
    for found in result.fitting:
        topology = found.layout.topology
        assert topology.tensor_parallel * topology.pipeline_parallel * topology.data_parallel == 16
        assert topology.tensor_parallel <= 8
        assert 128 % (topology.micro_batch_size * topology.data_parallel) == 0
        assert found.memory.total <= HEADROOM * H100.memory_gib
    assert all(found.memory.total > HEADROOM * H100.memory_gib for found in result.too_large)


@given(
    tensor=st.sampled_from([1, 2, 4, 8]),
    pipeline=st.sampled_from([1, 2, 4, 8]),
    tied=st.booleans(),
    model=st.sampled_from(["1b", "8b", "70b"]),
)
def test_stages_hold_the_whole_model(tensor: int, pipeline: int, tied: bool, model: str) -> None:
    shape = dataclasses.replace(named_model_shape(model), tied_embeddings=tied)
    topology = layout(tensor=tensor, pipeline=pipeline, layers=shape.num_layers)
    held = sum(stage_parameters(shape, topology, stage) for stage in range(pipeline)) * tensor
    from launcher.contract.flops import embedding_parameters, parameters

    copies = embedding_parameters(shape) if tied and pipeline > 1 else 0
    norms = (tensor - 1) * shape.hidden_size * (2 * shape.num_layers + 1)  # which every rank holds
    assert held == parameters(shape) + copies + norms


@pytest.mark.parametrize(("pipeline", "virtual"), [(1, 1), (2, 1), (2, 23)])
def test_stages_whose_layers_differ_hold_the_whole_model(pipeline: int, virtual: int) -> None:
    """GLM-4.5-Air's first layer has no experts: its stage holds fewer weights than the other."""
    from launcher.contract.flops import expert_parameters, parameters

    shape = named_model_shape("106b-a12b")
    topology = layout(pipeline=pipeline, virtual=virtual, layers=46)
    experts = [stage_expert_parameters(shape, topology, stage) for stage in range(pipeline)]
    held = sum(stage_parameters(shape, topology, stage) for stage in range(pipeline)) + sum(experts)
    assert held == parameters(shape) == pytest.approx(106.9e9, rel=1e-3)
    assert experts[0] == (46 // pipeline - 1) * expert_parameters(shape)
    assert experts[1:] == [46 // pipeline * expert_parameters(shape)] * (pipeline - 1)


@pytest.mark.parametrize("name", ["16b-a3b", "671b-a37b"])
def test_tensor_parallel_ranks_have_what_makes_latents_whole(name: str) -> None:
    from launcher.contract.flops import expert_parameters, parameters

    shape, tensor = named_model_shape(name), 4
    assert shape.latent is not None
    held = tensor * stage_parameters(shape, layout(tensor=tensor, layers=shape.num_layers), 0)
    made = (shape.latent.normed + shape.latent.rotary_dim) * shape.hidden_size
    whole = shape.num_layers * (made + shape.latent.normed + 2 * shape.hidden_size) + shape.hidden_size
    experts = (shape.num_layers - len(shape.dense_layers)) * expert_parameters(shape)
    assert held == parameters(shape) - experts + (tensor - 1) * whole


def test_a_rank_multiplies_its_part_of_the_sequence_by_what_makes_latents() -> None:
    shape = named_model_shape("671b-a37b")
    workload = Workload(shape=shape, seq_length=4096, rows=8, attended=4096)
    one, apart = layout(layers=61), layout(tensor=4, layers=61)
    plain = dataclasses.replace(apart, sequence_parallel=False)
    found = [
        next(each for each in layer_products(workload, topology, LayerKind()) if each.place == "latents")
        for topology in (one, plain, apart)
    ]
    assert [product.read for product in found] == [found[0].read] * 3
    assert [found[0].weights / product.weights for product in found] == [1, 1, 4]


def layout(
    tensor: int = 1, pipeline: int = 1, virtual: int = 1, data: int = 1, micro: int = 1, *, layers: int = 32
) -> Topology:
    """Stages have equally many layers, in all those of 8B by default."""
    return Topology(
        world_size=tensor * pipeline * data,
        ranks_per_node=8,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        virtual_pipeline=virtual,
        context_parallel=1,
        expert_parallel=1,
        expert_tensor_parallel=tensor,
        data_parallel=data,
        sequence_parallel=tensor > 1,
        micro_batch_size=micro,
        global_batch_size=micro * data * pipeline,
        layers_per_stage=even_split(layers, pipeline * virtual),
    )


def in_flight_of_a_schedule(stages: int, virtual: int, micro_batches: int, stage: int) -> int:
    """Replays the order of Megatron-core's schedules: warm-up forwards, then one forward and one backward in turn."""
    total = micro_batches * virtual
    warm_up = (stages - stage - 1) if virtual == 1 else (stages - stage - 1) * 2 + (virtual - 1) * stages
    warm_up = min(warm_up, total)
    held = most = warm_up
    for _ in range(total - warm_up):
        held += 1
        most = max(most, held)
        held -= 1
    return most


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 6), st.data())
def test_micro_batches_in_flight(stages: int, virtual: int, rounds: int, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, stages - 1))
    virtual = virtual if stages > 1 else 1
    micro_batches = rounds * stages if virtual > 1 else rounds
    expected = in_flight_of_a_schedule(stages, virtual, micro_batches, stage)
    assert chunks_in_flight(layout(pipeline=stages, virtual=virtual), micro_batches, stage) == expected


def test_norms_are_not_computed_again_where_there_are_none_before_products() -> None:
    shape = dataclasses.replace(named_model_shape("8b"), norms_first=False)
    found = search_layouts(run(), shape, H100)
    assert {candidate.layout.recompute for candidate in found.fitting} == {"none", "selective", "full"}


def test_as_few_layers_are_computed_again_as_fit() -> None:
    """One layer less would not, where all layers fit and none recomputed does not; the fewer, the faster."""
    shape, spec = named_model_shape("8b"), run(batch=32)
    found = [one for one in search_layouts(spec, shape, H100).fitting if one.layout.recompute_layers is not None]
    assert found
    implementation = implementation_of(spec, shape, H100)
    for one in found:
        layers = one.layout.recompute_layers
        assert layers is not None and 1 <= layers < max(one.layout.topology.layers_per_stage)
        fewer = None if layers == 1 else layers - 1
        less = dataclasses.replace(one.layout, recompute="full" if fewer else "none", recompute_layers=fewer)
        whole = dataclasses.replace(one.layout, recompute_layers=None)
        memories = [largest_stage(workload_of(spec, shape), each, implementation).total for each in (less, whole)]
        assert memories[0] > HEADROOM * H100.memory_gib >= one.memory.total > memories[1]
        assert evaluate(workload_of(spec, shape), whole, H100, implementation).time.total > one.time.total
        assert one.overrides["train.recompute_layers"] == layers


def test_layouts_are_predicted_with_the_stages_that_their_runs_have() -> None:
    shape, spec = named_model_shape("8b"), run(nodes=1, gpus=4, batch=8)
    found = search_layouts(spec, shape, H100).fitting
    stages = {one: build_topology(with_layout(spec, one), shape).layers_per_stage for one in found}
    assert stages == {one: one.layout.topology.layers_per_stage for one in found}
    assert any(one.layout.recompute_layers is not None and len(set(split)) > 1 for one, split in stages.items())


def test_a_number_of_recomputed_layers_that_the_config_has_is_kept_or_taken_back() -> None:
    shape, spec = named_model_shape("8b"), run(batch=32)
    train = dataclasses.replace(spec.train, recompute="full", recompute_layers=5)
    own = dataclasses.replace(spec, train=train)
    kept = ("train.recompute", "train.recompute_layers")
    assert {one.layout.recompute_layers for one in search_layouts(own, shape, H100, kept).fitting} == {5}
    other = next(one for one in search_layouts(own, shape, H100).fitting if one.layout.recompute_layers is None)
    assert "train.recompute_layers=null" in override_words(own, other).split()
    most = dataclasses.replace(own, train=dataclasses.replace(train, recompute_layers=shape.num_layers))
    assert {one.layout for one in search_layouts(most, shape, H100).fitting} == {
        one.layout for one in search_layouts(spec, shape, H100).fitting
    }


def test_layouts_have_graphs_where_these_must_be() -> None:
    own = dataclasses.replace(run(batch=32, cuda_graphs="always"), data=DataSpec(seq_length=4096, packing=True))
    found = search_layouts(own, named_model_shape("8b"), H100).fitting
    assert found
    for one in found:
        topology = one.layout.topology
        assert (topology.tensor_parallel, topology.pipeline_parallel, one.layout.recompute) == (1, 1, "none")


def test_recomputed_layers_of_unequal_stages_are_counted_in_their_own_stage() -> None:
    """Stages of 24 and 8 layers, of which 8 are recomputed: a third of the first, all of the second."""
    shape, spec = named_model_shape("8b"), run(nodes=1, gpus=2, batch=32)
    workload = workload_of(spec, shape)
    topology = dataclasses.replace(layout(pipeline=2), layers_per_stage=(24, 8), global_batch_size=32)
    whole = Layout(topology=topology, recompute="full")
    some = dataclasses.replace(whole, recompute_layers=8)
    times = [evaluate(workload, one, H100, FUSED).time for one in (some, whole)]
    assert times[0].recompute == pytest.approx(times[1].recompute / 3)
    kept = layer_activation_bytes(workload, some, FUSED, workload.kinds[0])
    inputs = shape.hidden_size * 2 * 4096
    # The first stage has two micro-batches in flight, and each one layer more that is being recomputed.
    expected = [2 * (8 * inputs + 16 * kept) + kept, 8 * inputs + kept]
    assert [stage.activations * 2**30 for stage in pipeline_memory(workload, some, FUSED)] == pytest.approx(expected)


def test_the_first_layers_are_recomputed_and_not_average_ones() -> None:
    """GLM-4.5-Air's first layer has an MLP in place of experts, and keeps less than the others."""
    shape, spec = named_model_shape("106b-a12b"), run(nodes=1, gpus=1, batch=1)
    workload = workload_of(spec, shape)
    none = Layout(topology=layout(layers=46))
    first = dataclasses.replace(none, recompute="full", recompute_layers=1)
    kinds = workload.kinds[:2]
    kept = [layer_activation_bytes(workload, none, FUSED, kind) / 2**30 for kind in kinds]
    inputs = shape.hidden_size * 2 * 4096 / 2**30
    before, after = (largest_stage(workload, one, FUSED).activations for one in (none, first))
    assert kept[0] < kept[1]
    # Its inputs stay, and when it is recomputed it is there as it was.
    assert after - before == pytest.approx(inputs)


def test_ranks_that_share_experts_keep_the_inputs_of_all_rows() -> None:
    """With whole experts, each tensor parallel rank sends its own half of the tokens away, and gets as many."""
    shape, spec = named_model_shape("30b-a3b"), run(nodes=1, gpus=2, batch=2)
    workload = workload_of(spec, shape)
    shared = layout(layers=48, tensor=2)
    whole = dataclasses.replace(shared, expert_parallel=2, expert_tensor_parallel=1)
    rows = 8 * 4096
    inputs, unit = shape.hidden_size, FUSED.saved_mlp * shape.expert_ffn_hidden_size
    kept = [
        layer_activation_bytes(workload, Layout(topology=each), FUSED, workload.kinds[0]) for each in (shared, whole)
    ]
    expected = [rows * (inputs + unit / 2), EXPERT_IMBALANCE * rows / 2 * (inputs + unit)]
    assert kept[0] - kept[1] == pytest.approx(2 * (expected[0] - expected[1]))


def test_stages_with_the_same_layers_in_other_chunks_recompute_others() -> None:
    shape, spec = named_model_shape("8b"), run(nodes=1, gpus=2, batch=32)
    split = (12, 8, 4, 8)
    topology = dataclasses.replace(layout(pipeline=2, virtual=2), layers_per_stage=split, global_batch_size=32)
    some = Layout(topology=topology, recompute="full", recompute_layers=8)
    assert "full recompute of 8 layers a model chunk" in some.describe()
    workload = workload_of(spec, shape)
    stages = pipeline_memory(workload, some, FUSED)
    assert largest_stage(workload, some, FUSED) == max(stages, key=lambda stage: stage.total)
    whole = evaluate(workload, dataclasses.replace(some, recompute_layers=None), H100, FUSED).time.recompute
    # Of the second stage, the slowest with its output layer, these are all layers; of the first, all but 4.
    assert evaluate(workload, some, H100, FUSED).time.recompute == whole


def test_what_saves_memory_saves_it_and_costs_time() -> None:
    shape, spec = named_model_shape("8b"), run(batch=32)
    workload = workload_of(spec, shape)
    none, norms, selective, full = (
        evaluate(workload, Layout(topology=layout(data=16), recompute=recompute), H100, PLAIN)
        for recompute in ("none", "norms", "selective", "full")
    )
    assert none.memory.total > selective.memory.total > norms.memory.total > full.memory.total
    assert none.time.total < norms.time.total < selective.time.total < full.time.total
    assert norms.time.total < 1.01 * none.time.total
    assert full.time.total < none.time.total * 4 / 3 + 1e-9
    sharded = Layout(topology=layout(data=16))
    whole = dataclasses.replace(sharded, distributed_optimizer=False)
    assert largest_stage(workload, whole, PLAIN).optimizer == 16 * largest_stage(workload, sharded, PLAIN).optimizer
    chunk = 4096 / 2 * 128_256 * 2 / 2**30  # half of a row's, in bf16
    assert largest_stage(workload, sharded, FUSED).logits == pytest.approx(chunk)
    assert largest_stage(workload, sharded, PLAIN).logits == pytest.approx(6 * chunk)


def test_first_stage_holds_most_activations_and_only_the_last_the_logits() -> None:
    shape = named_model_shape("8b")
    stages = pipeline_memory(workload_of(run(), shape), Layout(topology=layout(pipeline=4, data=4)), PLAIN)
    assert [stage.stage for stage in stages] == [0, 1, 2, 3]
    activations = [stage.activations for stage in stages]
    assert activations == sorted(activations, reverse=True)
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]


def test_bubble_is_the_one_of_the_paper() -> None:
    """(pp - 1) / (m * vpp) of the time of the layers, where the head is as good as nothing."""
    shape = dataclasses.replace(named_model_shape("8b"), vocab_size=8)
    workload = workload_of(run(nodes=1, batch=32), shape)
    for virtual in (1, 2, 4):
        time = evaluate(workload, Layout(topology=layout(pipeline=8, virtual=virtual)), H100, FUSED).time
        busy = time.matmul + time.attention + time.elementwise
        assert time.pipeline_bubble == pytest.approx(busy * 7 / (32 * virtual), rel=1e-3)


def test_lora_needs_less_of_everything() -> None:
    shape, spec = named_model_shape("8b"), run(nodes=1, gpus=1, batch=8)
    adapted = dataclasses.replace(spec, model=ModelSpec(lora=LoraSpec(rank=16)))
    assert not search_layouts(spec, shape, H100).fitting
    best = search_layouts(adapted, shape, H100).fitting[0]
    assert best.memory.optimizer < 1


def test_frozen_products_add_adapters_on_one_rank_alone() -> None:
    """With dropout, or where ranks share a linear, an adapter is an operation of its own: more time, more memory."""
    shape = named_model_shape("8b")

    def judged(ranks: int = 1, **lora: object) -> tuple[float, float]:
        spec = run(nodes=1, gpus=ranks, batch=8)
        adapted = dataclasses.replace(spec, model=ModelSpec(lora=LoraSpec(rank=16, **lora)))  # type: ignore[arg-type]
        topology = layout(tensor=ranks, layers=shape.num_layers)
        found = evaluate(workload_of(adapted, shape), Layout(topology=topology, recompute="none"), H100, CURRENT)
        return found.tokens_per_second, found.memory.activations

    speed, kept = judged()
    for other in (judged(dropout=0.1), judged(dora=True)):
        assert other[0] < 0.95 * speed
        assert other[1] > 1.1 * kept
    assert judged(2) == judged(2, dropout=0.1)


def test_adapters_of_experts_and_routers_are_counted() -> None:
    shape, spec = named_model_shape("30b-a3b"), run(nodes=1, gpus=1, batch=8)

    def trained(**lora: object) -> tuple[int, int]:
        adapted = dataclasses.replace(spec, model=ModelSpec(lora=LoraSpec(rank=8, **lora)))  # type: ignore[arg-type]
        topology = layout(layers=shape.num_layers)
        return trained_parameters(workload_of(adapted, shape), topology, 0)

    attention = trained(targets=["q_proj", "v_proj"])
    assert attention[1] == 0
    assert trained(targets=["q_proj", "v_proj"], router=True)[0] == attention[0] + 48 * 128 * 2048
    assert trained(targets=["down_proj"]) == (0, 48 * 128 * 8 * (2048 + 768))
    assert trained()[1] == 3 * trained(targets=["down_proj"])[1]


def test_dense_layers_of_a_model_with_experts_take_their_own_time() -> None:
    """GLM-4.5-Air, whose first layer has no experts: with expert parallel it exchanges no tokens."""
    shape = named_model_shape("106b-a12b")
    topology = dataclasses.replace(layout(data=8, layers=46), expert_parallel=8)
    workload = Workload(shape=shape, seq_length=4096, rows=8, attended=4096)

    def seconds(dense: tuple[int, ...]) -> StepTime:
        changed = dataclasses.replace(shape, dense_layers=dense)
        return evaluate(dataclasses.replace(workload, shape=changed), Layout(topology=topology), H100, CURRENT).time

    none, all_but_one = seconds(()), seconds(tuple(range(1, 46)))
    assert all_but_one.expert_parallel == pytest.approx(none.expert_parallel / 46)
    assert all_but_one.matmul < none.matmul  # no rank has more tokens than the others


@pytest.mark.parametrize("model", ["8b", "70b", "gemma3-1b"])
def test_balanced_stages_are_no_slower_than_even_ones(model: str) -> None:
    """And faster by a tenth where the output layer costs as much as a few layers."""
    shape = dataclasses.replace(named_model_shape(model), num_layers=32)
    spec = dataclasses.replace(run(nodes=1, gpus=4, batch=32), topology=TopologySpec(pipeline_parallel=4))
    balanced = build_topology(spec, shape)
    even = dataclasses.replace(balanced, layers_per_stage=(8, 8, 8, 8))
    assert balanced.layers_per_stage != even.layers_per_stage
    never_late = dataclasses.replace(CURRENT, layer_launches=0)  # balanced is what GPUs do, not what the host launches
    seconds = [
        evaluate(workload_of(spec, shape), Layout(topology=topology), H100, never_late).time.total
        for topology in (balanced, even)
    ]
    assert seconds[0] < seconds[1]


def test_small_micro_batches_wait_for_the_host() -> None:
    """A step of 0.5B takes as many launches whatever its micro-batch holds, so fewer of them are faster."""
    spec = run(nodes=1, gpus=1, batch=8)

    def seconds(micro_batch: int) -> StepTime:
        own = dataclasses.replace(spec, train=dataclasses.replace(spec.train, micro_batch_size=micro_batch))
        shape = named_model_shape("0.5b")
        return evaluate(workload_of(own, shape), Layout(topology=build_topology(own, shape)), H100, CURRENT).time

    one, eight = seconds(1), seconds(8)
    layers = named_model_shape("0.5b").num_layers
    assert one.total > 8 * layers * CURRENT.layer_launches > 2 * eight.total
    assert one.overhead > 0.5 * one.total
    assert eight.overhead == CURRENT.step_overhead


def test_slowest_stage_and_its_waiting_for_the_others() -> None:
    """With equal layers and an output layer worth two of them, the last stage works and waits for three others."""
    shape = named_model_shape("8b")
    spec = dataclasses.replace(run(nodes=1, gpus=4, batch=32), topology=TopologySpec(pipeline_parallel=4))
    workload = workload_of(spec, shape)

    def times(*layers: int) -> StepTime:
        topology = dataclasses.replace(build_topology(spec, shape), layers_per_stage=layers)
        return evaluate(workload, Layout(topology=topology), H100, CURRENT).time

    even, uneven = times(8, 8, 8, 8), times(7, 8, 9, 8)
    assert even.matmul == uneven.matmul  # of the last stage
    assert even.pipeline_bubble == pytest.approx(uneven.pipeline_bubble, rel=0.01)
    assert times(5, 8, 15, 4).total > even.total


def test_more_gpus_are_faster_until_the_batch_is_used_up() -> None:
    shape, spec = named_model_shape("8b"), run(batch=256)
    speeds = [
        search_layouts(with_gpus(spec, gpus), shape, H100).fitting[0].tokens_per_second for gpus in (8, 16, 64, 256)
    ]
    assert speeds == sorted(speeds)
    assert speeds[-1] < 32 * speeds[0]


def test_context_parallel_stays_as_it_is() -> None:
    spec = dataclasses.replace(run(), topology=TopologySpec(context_parallel=2))
    result = search_layouts(spec, named_model_shape("8b"), H100)
    assert {found.layout.topology.context_parallel for found in result.fitting} == {2}
    assert any(found.layout.topology.sequence_parallel for found in result.fitting)


def sharing_rows(context: int, recompute: Recompute = "none") -> Candidate:
    """8B on 8 GPUs, tp1, a row of 32,768 tokens for each data parallel rank."""
    topology = dataclasses.replace(layout(data=8 // context), world_size=8, context_parallel=context)
    workload = Workload(shape=named_model_shape("8b"), seq_length=32_768, rows=8, attended=32_768)
    return evaluate(workload, Layout(topology=topology, recompute=recompute), H100, CURRENT)


def test_ranks_that_share_rows_need_less_memory_and_send_keys_and_values() -> None:
    alone, two, four = (sharing_rows(context) for context in (1, 2, 4))
    assert alone.memory.optimizer == two.memory.optimizer == four.memory.optimizer
    # 18 hidden sizes a token, of which keys and values, half of one, stay those of whole rows
    assert alone.memory.activations / 2 < two.memory.activations < 0.53 * alone.memory.activations
    assert two.memory.activations / 2 < four.memory.activations
    assert sharing_rows(2, "selective").memory.activations == sharing_rows(1, "selective").memory.activations / 2
    assert alone.time.context_parallel == 0
    # By hand: 2 rows a rank, 32 layers; keys and values of 8 heads of 128 in bf16; half of them sent, there and back
    sent = 2 * 32 * (2 * 8 * 128 * 2 * 32_768) * (1 / 2 + 1 / 2)
    assert two.time.context_parallel == pytest.approx(
        sent / (PAIR_RATE * H100.intra_node_bandwidth * H100.collective_efficiency * 1e9)
    )


@pytest.mark.parametrize(
    ("limit", "hours"),
    [("90", 1.5), ("10:30", 0.175), ("1:30:00", 1.5), ("2-0", 48), ("1-2:30", 26.5), ("1-2:30:36", 26.51)],
)
def test_hours_of_a_time_limit(limit: str, hours: float) -> None:
    spec = dataclasses.replace(
        run(), train=TrainSpec(epochs=1), resources=ResourcesSpec(nodes=2, gpus_per_node=8, time=limit)
    )
    cost = run_cost(spec, None)
    assert cost is not None and cost.gpu_hours == pytest.approx(16 * hours)


def test_no_cost_is_invented() -> None:
    epochs = dataclasses.replace(run(), train=TrainSpec(epochs=1))
    unlimited = dataclasses.replace(epochs, resources=ResourcesSpec(nodes=1, gpus_per_node=8, time="UNLIMITED"))
    assert run_cost(epochs, None) is run_cost(unlimited, None) is None


# --- commands


def test_plan_lists_layouts_and_says_why(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big), "--top", "3"]) == 0
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0].startswith("8.03B parameters, 128 rows of at most 4,096 tokens a step, on h100 (79.6 GiB)")
    assert lines[2].split()[:4] == ["GPUS", "TP", "PP", "VPP"]
    assert [line.split()[0] for line in lines[3:6]] == ["16"] * 3
    for word in (
        "best       ",
        "time       matrix products ",
        "why        tp",
        "why        pp",
        "left out   ",
        "cost ",
    ):
        assert word in text


def test_numbers_that_cannot_be_planned_for(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for gpus in ("0", "8..4", "8..99999999999", "x"):  # a range without an end would be planned for without one
        assert main(["plan", str(big), "--gpus", gpus]) == ExitCode.BAD_INPUT
        assert "give a number, or a range such as 8..1024" in capsys.readouterr().err
    for top in ("0", "-1", "x"):
        with pytest.raises(SystemExit):
            main(["plan", str(big), f"--top={top}"])
        assert f"--top: '{top}' is not a whole number above 0" in capsys.readouterr().err


def test_plan_of_a_range_as_json(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big), "--gpus", "8..32", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)
    assert [plan["gpus"] for plan in plans] == [8, 16, 32]
    best = plans[0]["layouts"][0]
    assert best["step_seconds"] == pytest.approx(sum(best["step_parts"].values()))
    assert best["cost"]["price"] == pytest.approx(2 * best["cost"]["gpu_hours"])
    assert all(stage["total"] < 80 for stage in best["stages"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "12"], "12 GPUs are not whole nodes of 8; nearest: 8, 16"),
        (["--gpus", "8-16"], "--gpus 8-16: give a number, or a range such as 8..1024"),
        (["cluster.gpu=h10"], "cluster.gpu: 'h10' is not a known kind of GPU; did you mean 'h100'?"),
        (["--cluster", "local", "resources.nodes=1"], "resources.gpus_per_node is 0, and only GPUs can be planned for"),
    ],
)
def test_plan_refuses(big: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    assert main(["plan", str(big), *words]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_plan_where_nothing_fits(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(big), "--gpus", "1"]) == 2
    assert "nothing fits: no layout of 1 GPU fits into 92% of the 79.6 GiB of h100" in capsys.readouterr().out


def test_auto_takes_what_the_plan_says(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["plan", str(big), "--json"])
    best = json.loads(capsys.readouterr().out)[0]["auto"]["layout"]["overrides"]
    assert main(["validate", str(big), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    for key, value in best.items():
        section, name = key.split(".")
        assert answer["config"][section][name] == value
        assert answer["sources"][key] == "plan"
    assert main(["validate", str(big)]) == 0
    assert "(topology: auto)\n" in capsys.readouterr().out


def test_auto_keeps_what_the_user_has_set(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(big), "train.recompute=full", "train.micro_batch_size=4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["config"]["train"]["recompute"], answer["config"]["train"]["micro_batch_size"]) == ("full", 4)
    assert answer["sources"]["train.recompute"] == "override"


def test_sizes_by_override_win_over_auto_and_back(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(big), "topology.tensor_parallel=4", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["sources"]["topology.tensor_parallel"] == "override"
    big.write_text(big.read_text().replace("topology: auto", "topology: {tensor_parallel: 8}"))
    assert main(["validate", str(big), "topology=auto", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["sources"]["topology.tensor_parallel"] == "plan"


def test_auto_without_a_known_gpu(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", str(big), "cluster.gpu="]) == 2
    assert "topology: auto: cluster big does not say what its GPUs are; set cluster.gpu" in capsys.readouterr().err


def test_what_cannot_fit_is_refused_with_a_way_out(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["topology.tensor_parallel=1", "train.micro_batch_size=8"]
    assert main(["submit", str(big), *words, "--yes"]) == 2
    error = capsys.readouterr().err
    assert " GiB too much (stage 0: activations " in error
    way_out = error.rpartition(": ")[2].split()
    assert main(["validate", str(big), *way_out]) == 0
    assert main(["validate", str(big), *words, "topology.check_memory=false"]) == 0


def test_stages_that_do_not_fit_may_fit_with_other_numbers_of_layers(
    big: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first stage holds most micro-batches; what is proposed is accepted."""
    words = ["resources.nodes=1", "resources.gpus_per_node=4", "topology.pipeline_parallel=4", "data.seq_length=6144"]
    words += ["train.micro_batch_size=2"]
    assert main(["validate", str(big), *words, "topology.check_memory=false"]) == 0
    assert main(["validate", str(big), *words]) == 2
    error = capsys.readouterr().err
    assert "GiB too much (stage 0: activations" in error
    way_out = error.strip().rpartition(": ")[2]
    assert way_out.startswith("topology.layers_per_stage=[")
    assert main(["validate", str(big), *words, way_out]) == 0


def test_costly_run_is_not_submitted_unasked(big: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(big)]) == 2  # pytest's stdin is no terminal
    error = capsys.readouterr().err
    assert "GPU hours (cost " in error and "resources.gpu_hour_limit is 10.0; submit with --yes" in error
    assert not (big.parent / "runs").exists()


@pytest.mark.parametrize(("answer", "asked_again"), [("y\n", True), ("\n", False)])
def test_costly_run_is_asked_for_on_a_terminal(
    big: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], answer: str, asked_again: bool
) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

        def readline(self) -> str:
            return answer

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setenv("PATH", "/nonexistent")  # no sbatch: what is submitted fails there, with the scheduler's code
    assert main(["submit", str(big)]) == (3 if asked_again else 2)
    assert ("not submitted" in capsys.readouterr().err) is not asked_again


def test_packed_rows_go_several_to_a_micro_batch() -> None:
    spec = dataclasses.replace(run(), data=DataSpec(seq_length=4096, packing=True))
    sizes = {
        found.layout.topology.micro_batch_size for found in search_layouts(spec, named_model_shape("8b"), H100).fitting
    }
    assert sizes > {1, 2}


def test_predictions_of_a_config_without_gpus_are_not_made(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "cfg.yaml"]) == 0
    assert "predicted" not in capsys.readouterr().out


def test_topology_of_a_candidate_is_what_the_config_builds() -> None:
    shape, spec = named_model_shape("8b"), run()
    for found in search_layouts(spec, shape, H100).fitting[::10]:
        assert build_topology(with_layout(spec, found), shape) == found.layout.topology
