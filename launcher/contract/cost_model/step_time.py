"""Predict the time of one optimizer step, and what it is spent on.

The slowest stage also waits while a micro-batch passes through each of the others, once a step and with virtual stages
for a part of it: (pp - 1) / vpp micro-batches where all are equal (Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, section 2.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.adapters import expert_adapters
from launcher.contract.cost_model.implementation import Implementation
from launcher.contract.cost_model.layer_kinds import (
    KindCounts,
    LayerKind,
    counts_by_chunk,
    counts_by_stage,
    recomputed_by_chunk,
    recomputed_by_stage,
)
from launcher.contract.cost_model.memory import micro_batch_tokens
from launcher.contract.cost_model.passes import Pass, head_pass, layer_pass, link_rate, recompute_seconds, ring
from launcher.contract.cost_model.products import memory_rate
from launcher.contract.cost_model.workload import Layout, Workload, trained_parameters
from launcher.contract.cuda_graphs import graphs_pay, layout_without_graphs
from launcher.contract.hardware import GpuKind
from launcher.contract.topology import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class StepTime:
    """Seconds of a step on the slowest stage. Communication counts only as far as no computation hides it."""

    matmul: float = 0.0
    attention: float = 0.0
    elementwise: float = 0.0
    recompute: float = 0.0
    tensor_parallel: float = 0.0
    context_parallel: float = 0.0
    pipeline_bubble: float = 0.0
    pipeline_sends: float = 0.0
    data_parallel: float = 0.0
    optimizer: float = 0.0
    expert_parallel: float = 0.0
    overhead: float = 0.0

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(seconds for _, seconds in self.parts())

    @property
    def communication(self) -> float:
        """All exposed communication, without the bubble."""
        between_stages = self.pipeline_sends + self.data_parallel
        return self.tensor_parallel + self.context_parallel + self.expert_parallel + between_stages

    def parts(self) -> list[tuple[str, float]]:
        """Return the parts of the step with their seconds, the longest first."""
        names = (field.name for field in dataclasses.fields(self))
        values: list[tuple[str, float]] = [(name, getattr(self, name)) for name in names]
        return sorted(values, key=lambda part: -part[1])

    def shares(self) -> list[tuple[str, float]]:
        """Return the parts as shares of the step."""
        total = self.total
        return [(name, seconds / total) for name, seconds in self.parts()]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Stage:
    """Seconds of one pipeline stage."""

    passes: Pass
    """Layers and output layer, per micro-batch."""
    recompute: float
    """Per micro-batch, as are the next two."""
    gradients: float
    """Adding gradients to their buffers."""
    launches: float
    """What the host needs to launch the kernels."""
    data_parallel: float
    """Per step, as is the optimizer's."""
    optimizer: float

    @property
    def late_launches(self) -> float:
        """Seconds per micro-batch in which the GPU waits for the host."""
        return self.micro_batch - self._on_gpu

    @property
    def micro_batch(self) -> float:
        """Seconds per micro-batch."""
        return max(self.launches, self._on_gpu)

    @property
    def _on_gpu(self) -> float:
        return self.passes.total + self.recompute + self.gradients

    def step(self, micro_batches: int) -> float:
        """Return the seconds of a step without waiting for other stages."""
        return micro_batches * self.micro_batch + self.data_parallel + self.optimizer


def step_time(workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation) -> StepTime:
    """Predict the time of one optimizer step: that of the slowest stage, and its waiting for the others."""
    topology = layout.topology
    count = workload.micro_batches(topology)
    parts = _Parts(workload, layout, gpu, implementation)
    stages = _stages(parts, workload, layout, gpu, implementation)
    slowest = max(stages, key=lambda stage: stage.step(count))
    passes = slowest.passes
    return StepTime(
        matmul=count * passes.matmul,
        attention=count * passes.attention,
        elementwise=count * (passes.elementwise + slowest.gradients),
        recompute=count * slowest.recompute,
        tensor_parallel=count * passes.tensor_parallel,
        context_parallel=count * passes.context_parallel,
        expert_parallel=count * passes.expert_parallel,
        pipeline_bubble=_waiting(parts, stages, slowest, workload, layout),
        pipeline_sends=count * _sends(workload, topology, gpu, implementation),
        data_parallel=slowest.data_parallel,
        optimizer=slowest.optimizer,
        overhead=implementation.step_overhead + count * slowest.late_launches,
    )


class _Parts:
    """Seconds per micro-batch of what stages are made of: layers of each kind, and the output layer."""

    def __init__(self, workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation) -> None:
        topology = layout.topology
        kinds = set(workload.kinds)
        self.by_kind = {kind: layer_pass(workload, topology, gpu, implementation, kind) for kind in kinds}
        self.head = head_pass(workload, topology, gpu, implementation)
        self._again = {kind: recompute_seconds(layout, one) for kind, one in self.by_kind.items()}

    def layers(self, counts: KindCounts) -> Pass:
        """Return the seconds of so many layers of each kind."""
        found = Pass()
        for kind, count in counts.items():
            found = found.plus(self.by_kind[kind], count)
        return found

    def recompute(self, counts: KindCounts) -> float:
        """Return the seconds of recomputation in so many recomputed layers of each kind."""
        return sum(count * self._again[kind] for kind, count in counts.items())


def _waiting(parts: _Parts, stages: Sequence[_Stage], slowest: _Stage, workload: Workload, layout: Layout) -> float:
    """Return the seconds of a step in which the slowest stage waits for others.

    That is the larger of two: the time in which a micro-batch passes once through the other stages, divided by the
    number of virtual stages, and what unequal model chunks cost in each micro-batch. In the interleaved schedule all
    stages work on their first chunk at about the same time, then on their second, and so on, so that each time the
    longest of these chunks counts. Schedules played through operation by operation agree within 6 %
    (tests/launcher/planning/test_pipeline_schedule.py).
    """
    topology = layout.topology
    once = (sum(stage.micro_batch for stage in stages) - slowest.micro_batch) / topology.virtual_pipeline
    if topology.virtual_pipeline == 1:
        return once
    each = {kind: one.total for kind, one in parts.by_kind.items()}
    chunks = counts_by_chunk(workload.kinds, topology.layers_per_stage)
    recomputed = recomputed_by_chunk(workload.kinds, topology.layers_per_stage, layout.recompute_layers)
    seconds = [
        sum(count * each[kind] for kind, count in counts.items()) + parts.recompute(again)
        for counts, again in zip(chunks, recomputed, strict=True)
    ]
    seconds[-1] += parts.head.total
    size = topology.pipeline_parallel
    longest = sum(max(seconds[first : first + size]) for first in range(0, len(seconds), size))
    own = slowest.passes.total + slowest.recompute
    return max(once, workload.micro_batches(topology) * (longest - own))


def _stages(
    parts: _Parts, workload: Workload, layout: Layout, gpu: GpuKind, implementation: Implementation
) -> list[_Stage]:
    """Return the seconds of every stage. Stages that hold the same are computed once."""
    topology = layout.topology
    known: dict[tuple[frozenset[tuple[LayerKind, int]], float, bool, bool], _Stage] = {}
    stages = []
    split, size = topology.layers_per_stage, topology.pipeline_parallel
    by_stage = counts_by_stage(workload.kinds, split, size)
    recomputed = recomputed_by_stage(workload.kinds, split, size, layout.recompute_layers)
    for number, (counts, again) in enumerate(zip(by_stage, recomputed, strict=True)):
        last, recompute = number == size - 1, parts.recompute(again)
        key = (frozenset(counts.items()), recompute, number == 0, last)
        if key not in known:
            trained, head = trained_parameters(workload, topology, number), parts.head if last else Pass()
            launches = _launches(workload, layout, implementation, counts)
            layers = parts.layers(counts)
            known[key] = _stage(layers, head, recompute, launches, trained, workload, layout, gpu, implementation)
        stages.append(known[key])
    return stages


def _launches(workload: Workload, layout: Layout, implementation: Implementation, counts: KindCounts) -> float:
    """Return the seconds per micro-batch in which the host launches the kernels of so many layers one by one."""
    topology, shape = layout.topology, workload.shape
    tokens = micro_batch_tokens(workload, topology)
    wanted = graphs_pay(implementation.graphs, shape, workload.seq_length, tokens, adapted=workload.adapted)
    if wanted and layout_without_graphs(topology, workload.precision, layout.recompute, shape) is None:
        return 0.0
    layers, routed = sum(counts.values()), 0
    if not workload.adapted:
        return layers * implementation.layer_launches
    if shape.num_experts and expert_adapters(shape, workload.lora):
        routed = sum(count for kind, count in counts.items() if not kind.dense)
    return (layers - routed) * implementation.adapted_layer_launches + routed * implementation.adapted_expert_launches


def _stage(
    layers: Pass,
    head: Pass,
    recompute: float,
    launches: float,
    trained: tuple[int, int],
    workload: Workload,
    layout: Layout,
    gpu: GpuKind,
    implementation: Implementation,
) -> _Stage:
    """Return the seconds of a stage with `trained` parameters outside of experts and in experts."""
    gradients = sum(trained) * implementation.gradient_bytes * layout.gradient_width / 4 / memory_rate(gpu)
    backward = (layers.total + recompute + gradients + head.matmul + head.elementwise) * 2 / 3
    return _Stage(
        passes=layers.plus(head),
        recompute=recompute,
        gradients=gradients,
        launches=launches,
        data_parallel=_data_parallel(trained, workload, layout, gpu, implementation, backward),
        optimizer=_optimizer(trained, layout, gpu, implementation),
    )


def _sends(workload: Workload, topology: Topology, gpu: GpuKind, implementation: Implementation) -> float:
    """Return the seconds per micro-batch of the exchange with neighbouring stages."""
    if topology.pipeline_parallel == 1:
        return 0.0
    waiting = implementation.exchange_overhead * topology.virtual_pipeline
    if topology.virtual_pipeline > 1:
        return waiting  # the interleaved schedule hides the transfer
    sequence = topology.tensor_parallel if topology.sequence_parallel else 1
    size = micro_batch_tokens(workload, topology) * workload.shape.hidden_size * workload.width / sequence
    neighbours_apart = topology.world_size // topology.pipeline_parallel
    return waiting + 2 * size / link_rate(gpu, 1, crosses=neighbours_apart >= topology.ranks_per_node)


def _data_parallel(
    trained: tuple[int, int],
    workload: Workload,
    layout: Layout,
    gpu: GpuKind,
    implementation: Implementation,
    backward: float,
) -> float:
    """Return the exposed seconds per step of reducing gradients and gathering updated weights."""
    topology, (dense, experts) = layout.topology, trained
    # Each parameter, weighted by the part of it that a rank sends around its ring.
    sent = dense * ring(topology.reducing_ranks) + experts * ring(topology.expert_reducing_ranks)
    rate = _data_parallel_rate(topology, gpu)
    reduce = (1 if layout.distributed_optimizer else 2) * sent * layout.gradient_width / rate
    gather = sent * workload.width / rate if layout.distributed_optimizer else 0.0
    if not layout.overlap:
        return reduce + gather
    hidden = min(reduce, backward)
    if implementation.gathers_behind_forward:
        hidden += min(gather, backward / 2)
    taken = (
        implementation.hidden_collectives_cost * hidden * rate / link_rate(gpu, topology.reducing_ranks, crosses=False)
    )
    return reduce + gather - hidden + taken


def _optimizer(trained: tuple[int, int], layout: Layout, gpu: GpuKind, implementation: Implementation) -> float:
    dense, experts = trained
    updated: float = dense + experts
    if layout.distributed_optimizer:
        updated = dense / layout.topology.reducing_ranks + experts / layout.topology.expert_reducing_ranks
    return updated * implementation.optimizer_bytes / memory_rate(gpu)


def _data_parallel_rate(topology: Topology, gpu: GpuKind) -> float:
    """Return the bytes per second of a data parallel ring.

    Between nodes it uses the network cards of all its members on a node, up to the rate within the node.
    """
    if topology.tensor_parallel * topology.reducing_ranks <= topology.ranks_per_node:
        return link_rate(gpu, topology.reducing_ranks, crosses=False)
    members = max(1, topology.ranks_per_node // topology.tensor_parallel)
    within, between = (link_rate(gpu, topology.reducing_ranks, crosses=crosses) for crosses in (False, True))
    return min(within, members * between)
