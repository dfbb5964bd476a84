"""What to set before the next try, by the cause of an attempt's end: `key=value` words for `launcher resubmit`.

They are the first things that a person would try, taken from the run's own settings. Whether they help is for the next
attempt to tell. `launcher.attempts.restart` decides without them whether there is one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.attempts.cause import Cause
from launcher.contract.divisors import divisors
from launcher.contract.rank_error import RankError
from launcher.contract.rundir import complete_checkpoints
from launcher.contract.spec import RunSpec
from launcher.contract.time_limit import as_time_limit, time_limit_minutes


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One thing to set."""

    key: str
    """The config key."""
    value: str | None
    """What to set it to; null where only a person can know."""
    why: str
    """What that changes."""


def remedies(spec: RunSpec, decision: Mapping[str, Any], error: RankError | None) -> list[Remedy]:
    """Return what to set after an attempt that ended as `decision`, its `restart_decided` event, says."""
    cause = decision.get("cause")
    if error is not None and "CheckpointError" in error.kinds and cause != Cause.DISK_FULL:
        return list(_of_checkpoint(spec))
    if cause == Cause.OUT_OF_MEMORY:
        return list(_of_memory(spec))
    if cause == Cause.TIMEOUT:
        return list(_of_time(spec))
    if cause == Cause.DISK_FULL:
        return list(_of_space(spec))
    if cause in (Cause.BAD_NODE, Cause.NODE_FAILURE):
        return list(_of_nodes(spec, decision.get("avoid")))
    return []


def _of_memory(spec: RunSpec) -> Iterator[Remedy]:
    size = spec.train.micro_batch_size
    if size > 1:
        smaller = max(number for number in divisors(size) if number < size)
        why = f"rows of one forward pass, {size} now; the batch of a step stays as it is"
        yield Remedy(key="train.micro_batch_size", value=str(smaller), why=why)
    if spec.train.cuda_graphs == "always":  # with which nothing can be computed again
        why = "graphs of layers have memory of their own, and allow no activations to be computed again"
        yield Remedy(key="train.cuda_graphs", value="never", why=why)
    elif spec.train.recompute != "full":
        why = "activations are computed again in the backward pass instead of kept"
        yield Remedy(key="train.recompute", value="full", why=why)
    elif spec.train.recompute_layers is not None:
        why = f"all layers are computed again, and not {spec.train.recompute_layers} of each pipeline stage"
        yield Remedy(key="train.recompute_layers", value="null", why=why)
    yield Remedy(key="resources.nodes", value=None, why="more GPUs share weights and optimizer states")


def _of_time(spec: RunSpec) -> Iterator[Remedy]:
    minutes = time_limit_minutes(spec.resources.time)
    if minutes is not None:
        why = f"twice the time limit of {spec.resources.time}"
        yield Remedy(key="resources.time", value=as_time_limit(2 * minutes), why=why)
    if spec.checkpoint.every is not None and spec.checkpoint.every > 1:
        why = f"less is lost at the limit; a checkpoint is written every {spec.checkpoint.every} steps now"
        yield Remedy(key="checkpoint.every", value=str(spec.checkpoint.every // 2), why=why)


def _of_space(spec: RunSpec) -> Iterator[Remedy]:
    if spec.checkpoint.keep_last > 1:
        why = f"older checkpoints are removed, {spec.checkpoint.keep_last} are kept now"
        yield Remedy(key="checkpoint.keep_last", value="1", why=why)
    yield Remedy(key="run_root", value=None, why=f"a folder on a disk with space, instead of {spec.run_root}")


def _of_nodes(spec: RunSpec, avoided: object) -> Iterator[Remedy]:
    hosts = [str(host) for host in avoided] if isinstance(avoided, list) else []
    if hosts:
        words = ",".join([*([spec.resources.exclude] if spec.resources.exclude else []), *hosts])
        yield Remedy(key="resources.exclude", value=words, why="nodes that the run's own checks named")


def _of_checkpoint(spec: RunSpec) -> Iterator[Remedy]:
    given = spec.checkpoint.resume_from
    if given is None:
        return
    others = [path for path in complete_checkpoints(Path(given).parent) if path != Path(given)]
    why = "the newest other complete checkpoint beside it" if others else "no other is complete: train from the start"
    yield Remedy(key="checkpoint.resume_from", value=str(others[-1]) if others else "null", why=why)
