"""A config's machine, its length, and whether it fits: what plan, validate and submit share."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from launcher.contract.cost_model.implementation import CURRENT
from launcher.contract.cost_model.predict import Candidate, evaluate
from launcher.contract.cost_model.workload import Layout
from launcher.contract.errors import ConfigError, TopologyError
from launcher.contract.hardware import GpuKind, gpu_kind, gpu_kinds
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from launcher.planning.search import HEADROOM, SearchResult, nearest_fitting, search, workload_of


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCost:
    """GPU hours of a whole run, and where the figure comes from."""

    gpu_hours: float
    price: float | None
    """In the site's unit; None where no price is known."""
    why: str

    def describe(self) -> str:
        """`at most 1,234.5 GPU hours (cost 2,469.00): why`."""
        cost = "" if self.price is None else f" (cost {self.price:,.2f})"
        return f"{self.gpu_hours:,.1f} GPU hours{cost}: {self.why}"


def gpu_of(spec: RunSpec) -> GpuKind | None:
    """The cluster's kind of GPU with the site's own network; None where it has none or does not say."""
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
    """Memory and speed of the run as it is configured."""
    layout = Layout(
        topology=topology, recompute=spec.train.recompute, distributed_optimizer=spec.train.optimizer.distributed
    )
    return evaluate(workload_of(spec, shape), layout, gpu, CURRENT)


def check_fit(spec: RunSpec, found: Candidate, shape: ModelShape, gpu: GpuKind) -> None:
    """TopologyError where the run cannot fit into its GPUs, with what would."""
    if found.missing <= 0:
        return
    result = search(spec, shape, gpu)
    raise TopologyError(
        f"topology: {found.layout.describe()} needs {found.memory.total:.1f} GiB on {gpu.name} of "
        f"{gpu.memory_gib:.1f} GiB, {found.missing:.1f} GiB too much (stage {found.memory.stage}: "
        f"{describe_memory(found)}); {_way_out(spec, result)}"
    )


def unknown_gpu(spec: RunSpec) -> str:
    """Why nothing can be predicted for this config's machine, and what to set."""
    if not spec.resources.gpus_per_node:
        return "resources.gpus_per_node is 0, and only GPUs can be planned for; set it"
    known = ", ".join(kind.name for kind in gpu_kinds())
    return f"cluster {spec.cluster.name} does not say what its GPUs are; set cluster.gpu to one of {known}"


def nothing_fits(spec: RunSpec, result: SearchResult) -> str:
    """Why a search gave no layout: the nearest one and what it lacks, or the rules."""
    gpus = spec.resources.world_size
    if result.too_large:
        nearest = result.too_large[0]
        return (
            f"no layout of {gpus} GPUs fits into {HEADROOM:.0%} of the {result.gpu.memory_gib:.1f} GiB of "
            f"{result.gpu.name}: the nearest, {nearest.layout.describe()}, needs {nearest.memory.total:.1f} "
            f"({describe_memory(nearest)}); take more GPUs (`launcher plan --gpus`), or shorten data.seq_length"
        )
    if result.fitting:
        return "no layout that fits has the train.micro_batch_size and train.recompute of the config; leave them out"
    rules = "; ".join(f"{sizes}: {rule}" for sizes, rule in result.broken[:3])
    return f"no layout of {gpus} GPUs keeps the rules ({rules})"


def describe_memory(candidate: Candidate) -> str:
    """Parts of the largest stage, largest first."""
    memory = candidate.memory
    names = ("weights", "gradients", "optimizer", "activations", "logits", "overhead")
    parts = sorted(((getattr(memory, name), name) for name in names), reverse=True)
    return ", ".join(f"{name} {size:.1f}" for size, name in parts if size >= 0.05)


def run_cost(spec: RunSpec, candidate: Candidate | None) -> RunCost | None:
    """GPU hours by steps, or else by the time limit; None where neither is known, or nothing was predicted."""
    if not spec.resources.gpus_per_node:
        return None
    world = spec.resources.world_size
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
    """Slurm's time format in hours: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S; None for no limit."""
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


def _way_out(spec: RunSpec, result: SearchResult) -> str:
    nearest = nearest_fitting(spec, result.fitting)
    if nearest is None:
        return nothing_fits(spec, result)
    return f"nearest that fits, with {nearest.memory.total:.1f} GiB: {override_words(nearest)}"


def override_words(candidate: Candidate) -> str:
    """The layout as `key=value` words for the command line."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in candidate.overrides.items()
    )
