"""What of a run in fp8 computes in bf16 all the same is planned so."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.contract.cost_model.assumptions import layout_of, workload_of
from launcher.contract.cost_model.implementation import CURRENT
from launcher.contract.cost_model.memory import pipeline_memory
from launcher.contract.cost_model.predict import Candidate
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import ModelShape, named_model_shape
from launcher.contract.spec import DataSpec, Fp8Spec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.topology import build_topology
from launcher.planning.run_plan import estimate

SHAPE = named_model_shape("8b")
ALL = ["qkv", "proj", "fc1", "fc2"]


def run(precision: str = "fp8", tensor: int = 1, pipeline: int = 1, **fp8: object) -> RunSpec:
    return RunSpec(
        resources=ResourcesSpec(nodes=1, gpus_per_node=8),
        topology=TopologySpec(tensor_parallel=tensor, pipeline_parallel=pipeline, sequence_parallel=tensor > 1),
        data=DataSpec(seq_length=4096, packing=True),
        train=TrainSpec(
            global_batch_size=64,
            max_steps=10,
            precision=precision,  # type: ignore[arg-type]
            fp8=Fp8Spec(**fp8),  # type: ignore[arg-type]
        ),
    )


def predicted(spec: RunSpec, shape: ModelShape = SHAPE) -> Candidate:
    return estimate(spec, build_topology(spec, shape), shape, gpu_kind("h100"))


def products(spec: RunSpec, shape: ModelShape = SHAPE) -> float:
    return predicted(spec, shape).time.matmul


def test_layers_in_bf16_take_the_time_of_bf16() -> None:
    low, high = products(run()), products(run("bf16"))
    assert low < 0.8 * high
    each = (high - low) / 32
    assert products(run(bf16_first_layers=3, bf16_last_layers=5)) == pytest.approx(low + 8 * each)


def test_gradients_in_bf16_take_half_of_the_gain() -> None:
    low, high = products(run()), products(run("bf16"))
    assert products(run(bf16_gradients=ALL)) == pytest.approx((low + high) / 2)
    parts = [products(run(bf16_gradients=[name])) - low for name in ALL]
    assert sum(parts) == pytest.approx((high - low) / 2)
    assert max(parts) == parts[ALL.index("fc1")]


def test_products_of_experts_stay_in_bf16() -> None:
    """The gain of Qwen3-30B-A3B is that of its attention alone."""
    shape = named_model_shape("30b-a3b")
    gain = products(run("bf16"), shape) - products(run(), shape)
    without = products(run(bf16_gradients=["fc1", "fc2"]), shape)
    assert 0 < gain < 0.2 * products(run("bf16"), shape)
    assert without == products(run(), shape)


def test_experts_in_fp8_pay_where_each_rank_has_few_and_wide_ones() -> None:
    """All matrices of a rank are rounded in every micro-batch, however few tokens each of them meets."""

    def gain(name: str, ranks: int = 1, **fp8: object) -> float:
        shape, found = named_model_shape(name), []
        for experts in (False, True):
            spec = run(experts=experts, **fp8)
            topology = dataclasses.replace(spec.topology, expert_parallel=ranks)
            found.append(products(dataclasses.replace(spec, topology=topology), shape))
        return 1 - found[1] / found[0]

    assert gain("30b-a3b") < 0 < gain("30b-a3b", 8) < gain("mixtral-8x7b", 8)
    half = gain("mixtral-8x7b", 8, bf16_gradients=["fc1"])
    assert half == pytest.approx(gain("mixtral-8x7b", 8) / 2, rel=0.05)


def test_matrices_of_experts_in_fp8_need_memory_where_their_rows_do_not_need_more() -> None:
    """Each product rounds all of a rank's matrices, gate and up projections together, and frees them at once."""
    shape = named_model_shape("mixtral-8x7b")

    def more(rows: int, **fp8: object) -> float:
        """GiB beside experts in bf16, with micro-batches of so many tokens."""
        found = []
        for experts in (True, False):
            spec = run(experts=experts, **fp8)
            short = dataclasses.replace(spec, data=dataclasses.replace(spec.data, seq_length=rows))
            found.append(predicted(short, shape).memory.allocated)
        return found[0] - found[1]

    matrices = 8 * 2 * 14336 * 4096 / 2**30
    assert 0.9 * matrices < more(256) < 1.1 * matrices
    assert more(256, bf16_first_layers=31) == more(256)
    assert more(16384) == 0


def test_a_stage_without_layers_in_fp8_has_no_matrices_in_it() -> None:
    shape = named_model_shape("mixtral-8x7b")
    spec = run(experts=True, pipeline=4, bf16_last_layers=24)
    workload, topology = workload_of(spec, shape), build_topology(spec, shape)
    layout = layout_of(spec, topology, "none")
    in_bf16 = dataclasses.replace(workload, fp8=Fp8Spec(bf16_last_layers=24))
    stages = zip(*(pipeline_memory(each, layout, CURRENT) for each in (workload, in_bf16)), strict=True)
    more = [with_experts.activations > without.activations for with_experts, without in stages]
    assert more[0]
    assert not any(more[2:])


def test_stages_of_layers_with_experts_in_fp8_are_balanced_so() -> None:
    """The last stage has the output layer, which is never in fp8."""
    shape = named_model_shape("30b-a3b")
    both = [build_topology(run(pipeline=4, experts=experts), shape).layers_per_stage for experts in (False, True)]
    assert both == [(13, 13, 13, 9), (13, 13, 14, 8)]


def test_layers_in_bf16_keep_what_those_of_bf16_keep() -> None:
    """With tensor parallel an MLP in fp8 is one operation, which does not keep the product of its unit."""
    low, high = (predicted(run(precision, tensor=2)).memory.activations for precision in ("fp8", "bf16"))
    some = predicted(run(tensor=2, bf16_first_layers=4, bf16_last_layers=4)).memory.activations
    assert some == pytest.approx(low + (high - low) / 4)
    assert low < high


def test_stages_are_balanced_by_what_their_layers_compute_in() -> None:
    """The first of two stages has fewer layers where these are in bf16, and each stage is planned with its own."""
    every, some = (build_topology(run(pipeline=2, **fp8), SHAPE) for fp8 in ({}, {"bf16_first_layers": 8}))
    assert some.layers_per_stage[0] < every.layers_per_stage[0]
    spec = run(tensor=2, pipeline=2, bf16_first_layers=8)
    workload, topology = workload_of(spec, SHAPE), build_topology(spec, SHAPE)
    first, second = pipeline_memory(workload, layout_of(spec, topology, "none"), CURRENT)
    layers = topology.layers_per_stage
    assert first.activations / layers[0] > 2 * second.activations / layers[1]  # two micro-batches, and bf16


def test_plain_kernels_in_fp8_are_planned() -> None:
    spec = run()
    plain = RunSpec(
        resources=spec.resources,
        data=spec.data,
        train=TrainSpec(global_batch_size=64, max_steps=10, precision="fp8", kernels="plain"),
    )
    assert predicted(plain).tokens_per_second < predicted(spec).tokens_per_second
