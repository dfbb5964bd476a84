"""Predicted steps of pipelines, compared with Megatron-core's schedules played through operation by operation."""

from __future__ import annotations

import dataclasses

import pytest

from launcher.contract.cost_model.assumptions import workload_of
from launcher.contract.cost_model.implementation import CURRENT
from launcher.contract.cost_model.passes import head_pass, layer_pass
from launcher.contract.cost_model.step_time import step_time
from launcher.contract.cost_model.workload import Layout
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, ResourcesSpec, RunSpec, TopologySpec, TrainSpec
from launcher.contract.stages import chunk_ranges, even_split
from launcher.contract.topology import build_topology

Operation = tuple[str, int, int]
"""F or B, model chunk in the model's order, micro-batch."""


def operations(stages: int, virtual: int, micro_batches: int, stage: int) -> list[Operation]:
    """A stage's forward and backward passes: some forward ones, then one of each in turn, then the rest."""
    total = micro_batches * virtual
    ahead = stages - stage - 1
    warm_up = min(total, ahead if virtual == 1 else 2 * ahead + (virtual - 1) * stages)

    def forward(number: int) -> Operation:
        if virtual == 1:
            return "F", stage, number
        group, place = divmod(number, stages * virtual)
        return "F", place // stages * stages + stage, group * stages + place % stages

    def backward(number: int) -> Operation:
        _, chunk, micro_batch = forward(number)
        return "B", (virtual - 1 - chunk // stages) * stages + stage, micro_batch

    found = [forward(number) for number in range(warm_up)]
    for number in range(warm_up, total):
        found += [forward(number), backward(number - warm_up)]
    return found + [backward(number) for number in range(total - warm_up, total)]


def played_through(seconds: list[float], stages: int, micro_batches: int) -> float:
    """The seconds of a step whose model chunks take these for both passes, the forward one a third of them."""
    count = len(seconds)
    waiting = [operations(stages, count // stages, micro_batches, stage)[::-1] for stage in range(stages)]
    clock, ended = [0.0] * stages, dict[Operation, float]()
    while any(waiting):
        before = len(ended)
        for stage, left in enumerate(waiting):
            while left:
                kind, chunk, micro_batch = left[-1]
                after: Operation | None = ("F", chunk - 1, micro_batch) if chunk else None
                if kind == "B":
                    after = ("B", chunk + 1, micro_batch) if chunk + 1 < count else ("F", chunk, micro_batch)
                if after is not None and after not in ended:
                    break
                start = max(clock[stage], 0.0 if after is None else ended[after])
                clock[stage] = ended[left.pop()] = start + seconds[chunk] * (1 / 3 if kind == "F" else 2 / 3)
        assert len(ended) > before, "the schedule waits for itself"
    return max(clock)


LAYERS = {"3b": 28, "8b": 32, "70b": 94, "gemma3-1b": 26}
CASES = [
    pytest.param(model, stages, virtual, given, id=f"{model}-pp{stages}-vpp{virtual}-{'even' if given else 'balanced'}")
    for model, layers in LAYERS.items()
    for stages in (2, 4, 8)
    for virtual in (1, 2, 3, 5)
    for given in dict.fromkeys(((), even_split(layers, stages * virtual)))
    if stages * virtual <= layers
]


@pytest.mark.parametrize(("model", "stages", "virtual", "given"), CASES)
def test_prediction_is_near_the_schedule(model: str, stages: int, virtual: int, given: tuple[int, ...]) -> None:
    """Also where the output layer costs as much as many layers, and where stages have equally many."""
    shape = dataclasses.replace(named_model_shape(model), num_layers=LAYERS[model])
    spec = RunSpec(
        resources=ResourcesSpec(nodes=1, gpus_per_node=stages),
        topology=TopologySpec(pipeline_parallel=stages, virtual_pipeline=virtual, layers_per_stage=list(given)),
        data=DataSpec(seq_length=4096),
        train=TrainSpec(global_batch_size=4 * stages),
    )
    topology, workload, gpu = build_topology(spec, shape), workload_of(spec, shape), gpu_kind("h100")
    passes_alone = dataclasses.replace(CURRENT, gradient_bytes=0, optimizer_bytes=0, step_overhead=0, layer_launches=0)
    each = [layer_pass(workload, topology, gpu, passes_alone, kind).total for kind in workload.kinds]
    seconds = [sum(each[layer] for layer in chunk) for chunk in chunk_ranges(topology.layers_per_stage)]
    seconds[-1] += head_pass(workload, topology, gpu, passes_alone).total
    found = step_time(workload, Layout(topology=topology), gpu, passes_alone)
    expected = played_through(seconds, stages, 4 * stages)
    assert found.total - found.pipeline_sends == pytest.approx(expected, rel=0.06)
