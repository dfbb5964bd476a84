"""Enumerate the valid layouts of a run, predict memory and time of each, and rank them.

`launcher.contract.topology` alone decides which layouts are valid. Rejected: a solver. All layouts of 8,192 GPUs are a
few thousand, and each costs some microseconds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from launcher.contract.cost_model.implementation import CURRENT, Implementation
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.cost_model.workload import Layout, Recompute, Workload
from launcher.contract.divisors import divisors, nearest_multiples, shown_numbers
from launcher.contract.errors import TopologyError
from launcher.contract.hardware import GpuKind
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import build_topology, expert_tensor_parallel, layers_per_stage, sequence_multiple

MICRO_BATCH_SIZES = (1, 2, 4, 8, 16)
HEADROOM = 0.92
"""Part of the memory that a proposed layout may need, as the model errs by some per cent. A run is refused only where
it needs more than all of it."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "norms", "selective", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The layouts of one number of GPUs."""

    workload: Workload
    gpu: GpuKind
    fitting: tuple[Candidate, ...]
    """Layouts with headroom left, fastest first."""
    too_large: tuple[Candidate, ...]
    """Layouts that keep the rules but need too much memory, those that need least first."""
    broken: tuple[tuple[str, str], ...]
    """Sizes that break a rule, each with the rule's message."""


def workload_of(spec: RunSpec, shape: ModelShape) -> Workload:
    """Return one step of the run at its largest: every example has data.seq_length tokens and a row of its own."""
    train, length = spec.train, spec.data.seq_length
    rows = train.global_batch_size // length if train.global_batch_unit == "tokens" else train.global_batch_size
    return Workload(
        shape=shape,
        seq_length=length,
        rows=max(1, rows),
        attended=length,
        precision=train.precision,
        lora=spec.model.lora,
    )


def with_gpus(spec: RunSpec, gpus: int) -> RunSpec:
    """Return the same run on so many GPUs: whole nodes, or a part of one."""
    each = spec.resources.gpus_per_node
    if gpus % each and gpus > each:
        nearest = shown_numbers(nearest_multiples(gpus, each))
        raise TopologyError(f"{gpus} GPUs are not whole nodes of {each}; nearest: {nearest}")
    nodes, per_node = (gpus // each, each) if gpus >= each else (1, gpus)
    resources = dataclasses.replace(spec.resources, nodes=nodes, gpus_per_node=per_node, tasks_per_node=None)
    return dataclasses.replace(spec, resources=resources)


def search_layouts(
    spec: RunSpec, shape: ModelShape, gpu: GpuKind, implementation: Implementation = CURRENT
) -> SearchResult:
    """Predict every layout of the run's GPUs, with context_parallel as the config has it."""
    workload = workload_of(spec, shape)
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    broken: list[tuple[str, str]] = []
    for sizes in _sizes(spec, shape):
        variant = _variant(spec, sizes)
        try:
            topology = build_topology(variant, shape)
        except TopologyError as error:
            if sizes.virtual == 1 and sizes.micro == 1 and sizes.experts == 1:
                broken.append((f"tp{sizes.tensor} pp{sizes.pipeline}", error.problems[0]))
            continue
        for recompute in RECOMPUTE:
            layers = layers_per_stage(_with_recompute(variant, recompute), shape)
            layout = Layout(
                topology=dataclasses.replace(topology, layers_per_stage=layers),
                recompute=recompute,
                distributed_optimizer=spec.train.optimizer.distributed,
            )
            candidate = evaluate(workload, layout, gpu, implementation)
            fits = candidate.memory.total <= HEADROOM * gpu.memory_gib
            (fitting if fits else too_large).append(candidate)
    return SearchResult(
        workload=workload,
        gpu=gpu,
        fitting=tuple(sorted(fitting, key=_slowness)),
        too_large=tuple(sorted(too_large, key=lambda candidate: candidate.missing)),
        broken=tuple(broken),
    )


def nearest_fitting(spec: RunSpec, fitting: Sequence[Candidate]) -> Candidate | None:
    """Return the layout that changes the fewest settings of `spec`, the fastest of several, or None."""
    if not fitting:
        return None
    given = {
        "topology.tensor_parallel": spec.topology.tensor_parallel,
        "topology.pipeline_parallel": spec.topology.pipeline_parallel,
        "topology.virtual_pipeline": spec.topology.virtual_pipeline,
        "topology.sequence_parallel": spec.topology.sequence_parallel,
        "topology.expert_parallel": spec.topology.expert_parallel,
        "topology.expert_tensor_parallel": expert_tensor_parallel(spec.topology),
        "train.micro_batch_size": spec.train.micro_batch_size,
        "train.recompute": spec.train.recompute,
    }
    return min(fitting, key=lambda candidate: sum(given[key] != value for key, value in candidate.overrides.items()))


def with_layout(spec: RunSpec, candidate: Candidate) -> RunSpec:
    """Return the run with this layout."""
    topology = candidate.layout.topology
    sizes = _Sizes(
        tensor=topology.tensor_parallel,
        pipeline=topology.pipeline_parallel,
        virtual=topology.virtual_pipeline,
        micro=topology.micro_batch_size,
        experts=topology.expert_parallel,
        expert_tensor=topology.expert_tensor_parallel,
    )
    return _with_recompute(_variant(spec, sizes), candidate.layout.recompute)


def _slowness(candidate: Candidate) -> tuple[float, int, int, int]:
    """Return a key that sorts fast layouts first, and of equally fast ones the simpler first."""
    topology = candidate.layout.topology
    return (
        -candidate.tokens_per_second,
        topology.pipeline_parallel,
        topology.tensor_parallel,
        RECOMPUTE.index(candidate.layout.recompute),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sizes:
    """Parallel sizes that are worth a check."""

    tensor: int
    pipeline: int
    virtual: int
    micro: int
    experts: int
    expert_tensor: int


def _sizes(spec: RunSpec, shape: ModelShape) -> Iterator[_Sizes]:
    """Yield the sizes that are worth a check."""
    ranks, world = spec.resources.ranks_per_node, spec.resources.world_size
    micro_batches = (1,) if spec.data.packing else MICRO_BATCH_SIZES
    for tensor in divisors(ranks):
        for pipeline in divisors(world // tensor):
            if pipeline > shape.num_layers:
                break
            for virtual in _virtual_sizes(shape.num_layers, pipeline):
                for micro in micro_batches:
                    for experts, expert_tensor in _expert_sizes(shape, tensor, world // pipeline):
                        yield _Sizes(
                            tensor=tensor,
                            pipeline=pipeline,
                            virtual=virtual,
                            micro=micro,
                            experts=experts,
                            expert_tensor=expert_tensor,
                        )


def _virtual_sizes(layers: int, pipeline: int) -> list[int]:
    """Return the numbers of model chunks a stage: of those with chunks of at most n layers the least, for each n."""
    if pipeline == 1:
        return [1]
    most = layers // pipeline
    return sorted({min(-(-layers // (pipeline * size)), most) for size in range(1, -(-layers // pipeline) + 1)})


def _expert_sizes(shape: ModelShape, tensor: int, stage_ranks: int) -> Iterator[tuple[int, int]]:
    """Yield expert parallel and expert tensor parallel sizes: experts whole on their ranks, or cut as all else is."""
    if not shape.num_experts:
        yield 1, tensor
        return
    for expert_tensor in {1, tensor}:
        for experts in divisors(stage_ranks // expert_tensor):
            if shape.num_experts % experts == 0:
                yield experts, expert_tensor


def _with_recompute(spec: RunSpec, recompute: Recompute) -> RunSpec:
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, recompute=recompute))


def _variant(spec: RunSpec, sizes: _Sizes) -> RunSpec:
    tensor, given = sizes.tensor, spec.topology
    same_stages = (sizes.pipeline, sizes.virtual) == (given.pipeline_parallel, given.virtual_pipeline)
    topology = dataclasses.replace(
        given,
        layers_per_stage=given.layers_per_stage if same_stages else [],
        tensor_parallel=tensor,
        pipeline_parallel=sizes.pipeline,
        virtual_pipeline=sizes.virtual,
        expert_parallel=sizes.experts,
        expert_tensor_parallel=None if sizes.expert_tensor == tensor else sizes.expert_tensor,
        # It saves memory and costs nothing wherever rows divide by it.
        sequence_parallel=tensor > 1
        and spec.data.seq_length % sequence_multiple(tensor, given.context_parallel, True) == 0,
    )
    train = dataclasses.replace(spec.train, micro_batch_size=sizes.micro)
    return dataclasses.replace(spec, topology=topology, train=train)
