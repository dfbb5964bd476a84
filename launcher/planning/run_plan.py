"""Predict a config's memory and cost on its cluster's GPUs, for plan, validate and submit alike."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from launcher.contract.cost_model.assumptions import implementation_of, layout_of, workload_of
from launcher.contract.cost_model.memory import largest_stage
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.errors import ConfigError, TopologyError
from launcher.contract.hardware import GpuKind, gpu_kind, gpu_kinds
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from launcher.planning.leaner_stages import leaner_stages
from launcher.planning.search import HEADROOM, SearchResult, nearest_fitting, search_layouts


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """GPU hours of a whole run, and how they were computed."""

    gpu_hours: float
    """GPUs times hours."""
    price: float | None
    """In the site's own unit; None where no price is known."""
    why: str
    """What the hours were computed from."""

    def describe(self) -> str:
        """Return `1,234.5 GPU hours (cost 2,469.00): why`."""
        cost = "" if self.price is None else f" (cost {self.price:,.2f})"
        return f"{self.gpu_hours:,.1f} GPU hours{cost}: {self.why}"


def gpu_of(spec: RunSpec) -> GpuKind | None:
    """Return the cluster's kind of GPU with the site's own network, or None without GPUs or a kind."""
    if not spec.resources.gpus_per_node:
        return None
    cluster = spec.cluster
    try:
        kind = gpu_kind(cluster.gpu) if cluster.gpu else None
    except ConfigError as error:
        raise ConfigError(f"cluster.gpu: {error}") from None
    if kind is None:
        kind = next((kind for kind in gpu_kinds() if kind.name == (cluster.gpu_type or "").lower()), None)
    if kind is not None and cluster.inter_node_bandwidth is not None:
        kind = dataclasses.replace(kind, inter_node_bandwidth=cluster.inter_node_bandwidth)
    return kind


def estimate(spec: RunSpec, topology: Topology, shape: ModelShape, gpu: GpuKind) -> Candidate:
    """Return memory and speed of the run as it is configured."""
    layout = layout_of(spec, topology, spec.train.recompute)
    return evaluate(workload_of(spec, shape), layout, gpu, implementation_of(spec, shape, gpu))


def check_fit(spec: RunSpec, predicted: Candidate, shape: ModelShape, gpu: GpuKind) -> None:
    """Raise TopologyError where the run cannot fit into its GPUs, with the nearest layout that does."""
    if predicted.missing <= 0:
        return
    result = search_layouts(spec, shape, gpu)
    raise TopologyError(
        f"topology: {predicted.layout.describe()} needs {predicted.memory.total:.1f} GiB on {gpu.name} of "
        f"{gpu.memory_gib:.1f} GiB, {predicted.missing:.1f} GiB too much (stage {predicted.memory.stage}: "
        f"{describe_memory(predicted)}); {_suggestion(spec, result)}{_leaner(result, predicted)}"
    )


def _leaner(result: SearchResult, predicted: Candidate) -> str:
    """Return how the same layout fits with other numbers of layers for its stages, or an empty text."""
    memory = HEADROOM * result.gpu.memory_gib
    layout = leaner_stages(result.workload, predicted.layout, result.implementation, memory)
    if layout is None:
        return ""
    layers = ",".join(map(str, layout.topology.layers_per_stage))
    needed = largest_stage(result.workload, layout, result.implementation).total
    return f"; or keep this layout, with {needed:.1f} GiB: topology.layers_per_stage=[{layers}]"


def unknown_gpu(spec: RunSpec) -> str:
    """Return why nothing can be predicted for this config's machine, and what to set."""
    if not spec.resources.gpus_per_node:
        return "resources.gpus_per_node is 0, and only GPUs can be planned for; set it"
    known = ", ".join(kind.name for kind in gpu_kinds())
    return f"cluster {spec.cluster.name} does not say what its GPUs are; set cluster.gpu to one of {known}"


def counted_gpus(spec: RunSpec) -> str:
    """Return the number of a run's GPUs, for people."""
    count = spec.resources.world_size
    return "1 GPU" if count == 1 else f"{count} GPUs"


def nothing_fits(spec: RunSpec, result: SearchResult) -> str:
    """Return why no layout was found: what the nearest one lacks, or which rules all of them break."""
    gpus = counted_gpus(spec)
    if result.too_large:
        nearest = result.too_large[0]
        return (
            f"no layout of {gpus} fits into {HEADROOM:.0%} of the {result.gpu.memory_gib:.1f} GiB of "
            f"{result.gpu.name}: the nearest, {nearest.layout.describe()}, needs {nearest.memory.total:.1f} "
            f"({describe_memory(nearest)}); take more GPUs (`launcher plan --gpus`), or shorten data.seq_length"
        )
    rules = broken_rules(result)
    more = f"; and {len(rules) - 1} rules more that others break" if len(rules) > 1 else ""
    return f"no layout of {gpus} keeps the rules ({rules[0]}{more})"


def broken_rules(result: SearchResult) -> list[str]:
    """Return each rule that sizes break, once, with the first of those sizes and how many more there are."""
    sizes: dict[str, list[str]] = {}
    for words, rule in result.broken:
        sizes.setdefault(rule, []).append(words)
    return [
        f"{broken[0]}{f' and {len(broken) - 1} others' if len(broken) > 1 else ''}: {rule}"
        for rule, broken in sizes.items()
    ]


def describe_memory(candidate: Candidate) -> str:
    """Return what fills the memory of the largest stage, in GiB, largest part first."""
    memory = candidate.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    parts = sorted(((getattr(memory, name), name) for name in names), reverse=True)
    return ", ".join(f"{name} {size:.1f}" for size, name in parts if size >= 0.05)


def run_cost(spec: RunSpec, candidate: Candidate | None) -> RunCost | None:
    """Return the GPU hours by the number of steps, or else by the time limit, or None where neither is known.

    `candidate` is None where no step time could be predicted.
    """
    if not spec.resources.gpus_per_node:
        return None
    world = spec.resources.allocated_nodes * spec.resources.ranks_per_node
    if spec.train.max_steps is not None and candidate is not None:
        hours = spec.train.max_steps * candidate.time.total * world / 3600
        why = f"{spec.train.max_steps:,} steps of at most {spec.data.seq_length:,} tokens a row"
    elif spec.resources.time is not None and (limit := _hours(spec.resources.time)) is not None:
        hours, why = limit * world, f"one job's time limit of {spec.resources.time}; train.epochs alone says no more"
    else:
        return None
    price = spec.cluster.gpu_hour_price
    return RunCost(gpu_hours=hours, price=None if price is None else price * hours, why=why)


def _hours(limit: str) -> float | None:
    """Return a time limit of Slurm in hours, or None for no limit.

    Its forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S.
    """
    if not re.fullmatch(r"[\d:-]+", limit):
        return None
    days, _, rest = limit.rpartition("-")
    fields = [int(field) for field in rest.split(":")]
    if days:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
    elif len(fields) == 3:
        hours, minutes, seconds = fields
    else:
        hours, minutes, seconds = (0, *fields, 0)[:3]
    return int(days or 0) * 24 + hours + minutes / 60 + seconds / 3600


def _suggestion(spec: RunSpec, result: SearchResult) -> str:
    nearest = nearest_fitting(spec, result.fitting)
    if nearest is None:
        return nothing_fits(spec, result)
    return f"nearest that fits, with {nearest.memory.total:.1f} GiB: {override_words(spec, nearest)}"


def override_words(spec: RunSpec, candidate: Candidate) -> str:
    """Return the layout as `key=value` words for the command line, to put behind the config of `spec`."""
    values: dict[str, int | bool | str] = {}
    given = tuple(spec.topology.layers_per_stage)
    if given and candidate.layout.topology.layers_per_stage != given:
        values["topology.layers_per_stage"] = "[]"
    if spec.train.recompute_layers is not None and candidate.layout.recompute_layers is None:
        values["train.recompute_layers"] = "null"
    values |= candidate.overrides
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in values.items()
    )
