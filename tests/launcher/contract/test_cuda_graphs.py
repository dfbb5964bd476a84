"""Which runs launch their layers as CUDA graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from launcher.contract.cost_model.assumptions import implementation_of, layout_of, workload_of
from launcher.contract.cost_model.step_time import step_time
from launcher.contract.cuda_graphs import GraphChoice, no_graphs_because, uses_cuda_graphs
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import ModelShape, named_model_shape
from launcher.contract.spec import DataSpec, LoraSpec, ModelSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.topology import build_topology

SMALL = RunSpec(data=DataSpec(seq_length=4096, packing=True), train=TrainSpec(max_steps=1))


def changed(choice: GraphChoice = "auto", **train: Any) -> RunSpec:
    return dataclasses.replace(SMALL, train=dataclasses.replace(SMALL.train, cuda_graphs=choice, **train))


@pytest.mark.parametrize(
    ("spec", "because"),
    [
        (dataclasses.replace(SMALL, data=DataSpec(seq_length=4096)), "rows are not packed"),
        (dataclasses.replace(SMALL, topology=TopologySpec(tensor_parallel=2)), "tensor parallelism"),
        (dataclasses.replace(SMALL, topology=TopologySpec(pipeline_parallel=2)), "pipeline parallelism"),
        (dataclasses.replace(SMALL, topology=TopologySpec(context_parallel=2)), "context parallelism"),
        (dataclasses.replace(SMALL, model=ModelSpec(lora=LoraSpec(rank=8, dropout=0.1))), "model.lora.dropout"),
        (dataclasses.replace(SMALL, model=ModelSpec(attention_dropout=0.1)), "model.attention_dropout"),
        (changed(deterministic=True), "train.deterministic"),
        (changed(precision="fp8"), "train.precision fp8"),
        (changed(recompute="full"), "train.recompute full"),
    ],
)
def test_what_has_no_graphs(spec: RunSpec, because: str) -> None:
    assert no_graphs_because(spec, None) == because
    asked = dataclasses.replace(spec, train=dataclasses.replace(spec.train, cuda_graphs="always"))
    assert not uses_cuda_graphs(asked, named_model_shape("0.5b"))


@pytest.mark.parametrize(
    ("model", "because"), [("30b-a3b", "experts"), ("qwen3.5-4b", "linear attention"), ("1b", None), ("8b", None)]
)
def test_models(model: str, because: str | None) -> None:
    assert no_graphs_because(SMALL, named_model_shape(model)) == because


@pytest.mark.parametrize(
    ("choice", "rows", "used"), [("auto", 1, True), ("auto", 16, False), ("always", 16, True), ("never", 1, False)]
)
def test_small_micro_batches_have_them(choice: GraphChoice, rows: int, used: bool) -> None:
    """0.5B: 4,096 tokens are 0.5 TFLOP a layer, 65,536 are 8."""
    assert uses_cuda_graphs(changed(choice, micro_batch_size=rows), named_model_shape("0.5b")) == used


@pytest.mark.parametrize(
    ("model", "rows", "whole", "adapted"),
    [("0.5b", 1, True, True), ("0.5b", 16, False, False), ("3b", 1, False, True), ("3b", 2, False, False)],
)
def test_adapters_have_them_in_larger_micro_batches(model: str, rows: int, whole: bool, adapted: bool) -> None:
    """The host launches more kernels for a layer with adapters, and the GPU computes less."""
    spec = changed("auto", micro_batch_size=rows)
    assert uses_cuda_graphs(spec, named_model_shape(model)) == whole
    with_adapters = dataclasses.replace(spec, model=ModelSpec(lora=LoraSpec(rank=8)))
    assert uses_cuda_graphs(with_adapters, named_model_shape(model)) == adapted
    never = dataclasses.replace(with_adapters, train=dataclasses.replace(spec.train, cuda_graphs="never"))
    assert not uses_cuda_graphs(never, named_model_shape(model))


def planned_overhead(spec: RunSpec, shape: ModelShape) -> float:
    gpu = gpu_kind("h200")
    spec = dataclasses.replace(spec, resources=ResourcesSpec(gpus_per_node=1))
    layout = layout_of(spec, build_topology(spec, shape), spec.train.recompute)
    return step_time(workload_of(spec, shape), layout, gpu, implementation_of(spec, shape, gpu)).overhead


def test_the_planner_counts_no_launches_of_graphs() -> None:
    shape = named_model_shape("0.5b")
    one = {"global_batch_size": 1}
    by_graphs, without = (planned_overhead(changed(choice, **one), shape) for choice in ("auto", "never"))
    assert by_graphs == pytest.approx(0.004) and without > 0.04
    assert planned_overhead(changed("auto", recompute="full", **one), shape) > 0.01
