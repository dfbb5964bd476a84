"""Enumerate the valid layouts of a run, predict memory and time of each, and rank them.

`launcher.contract.topology` alone decides which layouts are valid. Rejected: a solver. All layouts of 8,192 GPUs are a
few thousand, and each costs some microseconds.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from launcher.contract.cost_model.assumptions import implementation_of, layout_of, workload_of
from launcher.contract.cost_model.implementation import Implementation
from launcher.contract.cost_model.memory import StageMemory, largest_stage
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.cost_model.workload import Layout, Recompute, Workload
from launcher.contract.divisors import nearest_multiples, shown_numbers
from launcher.contract.errors import TopologyError
from launcher.contract.hardware import GpuKind
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import build_topology, expert_tensor_parallel, layers_per_stage
from launcher.planning.variants import sizes_to_try, variant, with_recompute

HEADROOM = 0.92
"""Part of the memory that a proposed layout may need, as the model errs by some per cent. A run is refused only where
it needs more than all of it."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "norms", "selective", "full")
"""What is tried, from what is kept to what is computed again. `offload` costs the host's memory, which nobody knows
here: it is left to the user."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The layouts of one number of GPUs."""

    workload: Workload
    implementation: Implementation
    gpu: GpuKind
    fitting: tuple[Candidate, ...]
    """Layouts with headroom left, fastest first."""
    too_large: tuple[Candidate, ...]
    """Layouts that keep the rules but need too much memory, those that need least first."""
    broken: tuple[tuple[str, str], ...]
    """Sizes of which every layout breaks a rule, each with the first one's message."""


def with_gpus(spec: RunSpec, gpus: int) -> RunSpec:
    """Return the same run on so many GPUs: whole nodes, or a part of one."""
    each = spec.resources.gpus_per_node
    if gpus % each and gpus > each:
        nearest = shown_numbers(nearest_multiples(gpus, each))
        raise TopologyError(f"{gpus} GPUs are not whole nodes of {each}; nearest: {nearest}")
    nodes, per_node = (gpus // each, each) if gpus >= each else (1, gpus)
    resources = dataclasses.replace(spec.resources, nodes=nodes, gpus_per_node=per_node, tasks_per_node=None)
    return dataclasses.replace(spec, resources=resources)


def search_layouts(spec: RunSpec, shape: ModelShape, gpu: GpuKind, kept: Collection[str] = ()) -> SearchResult:
    """Predict every layout of the run's GPUs.

    What the config says by the keys in `kept`, of those in Candidate.overrides, is as it says; context_parallel always.
    """
    workload, implementation = workload_of(spec, shape), implementation_of(spec, shape, gpu)
    useful = tuple(kind for kind in RECOMPUTE if kind != "norms" or shape.norms_first)
    if spec.train.cuda_graphs == "always":
        useful = ("none",)
    recomputes = (spec.train.recompute,) if "train.recompute" in kept else useful
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    broken: dict[str, str] = {}
    valid: set[str] = set()
    for sizes in sizes_to_try(spec, shape, kept):
        run = variant(spec, sizes, kept)
        if "train.recompute" not in kept:
            run = with_recompute(run, run.train.recompute)  # another layout's stages may have fewer layers
        try:
            topology = build_topology(run, shape)
        except TopologyError as error:
            broken.setdefault(sizes.describe(), error.problems[0])
            continue
        valid.add(sizes.describe())
        for recompute in recomputes:
            again = with_recompute(run, recompute, run.train.recompute_layers if recompute == "full" else None)
            layout = _with_own_stages(layout_of(again, topology, recompute), again, shape)
            if recompute == "full" and "train.recompute" not in kept:
                layout = _with_fewest_recomputed(layout, again, workload, gpu, implementation)
            candidate = evaluate(workload, layout, gpu, implementation)
            (fitting if _has_headroom(candidate.memory, gpu) else too_large).append(candidate)
    return SearchResult(
        workload=workload,
        implementation=implementation,
        gpu=gpu,
        fitting=tuple(sorted(fitting, key=_slowness)),
        too_large=tuple(sorted(too_large, key=lambda candidate: candidate.missing)),
        broken=tuple((sizes, rule) for sizes, rule in broken.items() if sizes not in valid),
    )


def _with_own_stages(layout: Layout, run: RunSpec, shape: ModelShape) -> Layout:
    """Return the layout with the stages that the run has: which layers are recomputed decides on them."""
    if layout.topology.pipeline_parallel == 1:
        return layout
    topology = dataclasses.replace(layout.topology, layers_per_stage=layers_per_stage(run, shape))
    return dataclasses.replace(layout, topology=topology)


def _with_fewest_recomputed(
    layout: Layout, run: RunSpec, workload: Workload, gpu: GpuKind, implementation: Implementation
) -> Layout:
    """Return the layout with as few recomputed layers as fit, or with all if not even these do or none have to be."""

    def with_layers(layers: int | None, recompute: Recompute = "full") -> Layout:
        some = dataclasses.replace(layout, recompute=recompute, recompute_layers=layers)
        return _with_own_stages(some, with_recompute(run, recompute, layers), workload.shape)

    def fits(some: Layout) -> bool:
        return _has_headroom(largest_stage(workload, some, implementation), gpu)

    whole = with_layers(None)
    if fits(with_layers(None, "none")) or not fits(whole):
        return whole
    most = max(whole.topology.layers_per_stage)
    found = with_layers(bisect.bisect_left(range(1, most), True, key=lambda layers: fits(with_layers(layers))) + 1)
    return found if (found.recompute_layers or 0) < max(found.topology.layers_per_stage) else whole


def _has_headroom(memory: StageMemory, gpu: GpuKind) -> bool:
    return memory.total <= HEADROOM * gpu.memory_gib


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
        "train.recompute_layers": spec.train.recompute_layers,
    }
    return min(fitting, key=lambda candidate: sum(given[key] != value for key, value in candidate.overrides.items()))


def _slowness(candidate: Candidate) -> tuple[float, int, int, int]:
    """Return a key that sorts fast layouts first, and of equally fast ones the simpler first."""
    topology = candidate.layout.topology
    return (
        -candidate.tokens_per_second,
        topology.pipeline_parallel,
        topology.tensor_parallel,
        recompute_order(candidate.layout.recompute),
    )


def recompute_order(recompute: Recompute) -> int:
    """Return a number that is the smaller the less is computed again."""
    return RECOMPUTE.index(recompute) if recompute in RECOMPUTE else len(RECOMPUTE)
