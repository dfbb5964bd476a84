"""The GPU hours that runs have used: from the scheduler's accounting, or where there is none from the runs' events."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypedDict

from launcher.contract.errors import ConfigError, LauncherError, did_you_mean
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.manifest import Manifest, read_manifest
from launcher.contract.records import read_events, read_progress
from launcher.contract.rundir import RunPaths
from launcher.contract.schedulers import SchedulerName
from launcher.contract.spec import RunSpec, read_resolved
from launcher.contract.spec.fields import leaf_types
from launcher.runs.attempt_spans import Span, spans
from launcher.runs.snapshot import all_jobs
from launcher.runs.state import RunStatus, collect
from launcher.scheduler.base import Allocation
from launcher.scheduler.factory import scheduler_of

_NEAR_SECONDS = 120.0
"""How far an attempt's first event may be from its allocation: a prolog runs before it, and clocks differ."""
_HOUR = 3600.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Use:
    """What one attempt has used: one start of a job."""

    run: str
    """The run's name."""
    user: str
    """Who submitted the run."""
    group: str | None
    """The sweep that it belongs to."""
    job: str
    """Id of the job."""
    attempt: str | None
    """The attempt; null where the job ended before its script said anything."""
    state: JobState
    """How it ended: the accounting's word, or what the events say."""
    cause: str | None
    """Why it ended, as in `restart_decided`; `running` while it runs, null where nobody knows."""
    started: float
    """Seconds since the epoch."""
    seconds: float
    """How long it had its nodes."""
    nodes: int
    """Number of its nodes."""
    gpus: int
    """GPUs on all of them."""
    wasted_seconds: float
    """Time behind its last checkpoint if it did not succeed, and what it lost by going back to one."""
    source: Literal["accounting", "events"]
    """Where its time is from."""

    @property
    def gpu_hours(self) -> float:
        """GPUs times hours."""
        return self.gpus * self.seconds / _HOUR

    @property
    def wasted_gpu_hours(self) -> float:
        """Those of the wasted time."""
        return self.gpus * self.wasted_seconds / _HOUR

    @property
    def node_hours(self) -> float:
        """Nodes times hours."""
        return self.nodes * self.seconds / _HOUR


class _Names(TypedDict):
    run: str
    user: str
    group: str | None


class _Common(_Names):
    """What all attempts of an allocation have in common."""

    job: str
    nodes: int
    gpus: int
    source: Literal["accounting", "events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """What a run's files say."""

    paths: RunPaths
    manifest: Manifest
    spec: RunSpec
    spans: list[Span]
    jobs: list[Job]
    status: RunStatus


def uses(runs: Sequence[RunPaths]) -> tuple[list[Use], list[str]]:
    """Return what every attempt of these runs has used, and which runs could not be read."""
    rows, _ = collect(runs)
    known, unreadable = [], []
    for paths, row in zip(runs, rows, strict=True):
        try:
            known.append(_read(paths, row))
        except (LauncherError, ValueError, KeyError) as error:
            unreadable.append(f"{paths.name}: {error}")
    accounts = _accounts(known)
    return [use for run in known for use in _uses_of(run, accounts)], unreadable


def _read(paths: RunPaths, row: RunStatus) -> _Run:
    manifest, events = read_manifest(paths), read_events(paths)
    jobs = all_jobs(manifest, events)
    spec = read_resolved(paths.config)
    return _Run(paths=paths, manifest=manifest, spec=spec, spans=spans(events), jobs=jobs, status=row)


def _accounts(runs: Iterable[_Run]) -> dict[JobId, list[Allocation]]:
    """Ask each scheduler's accounting once, for all jobs."""
    jobs: dict[SchedulerName, list[Job]] = {}
    for run in runs:
        for job in run.jobs:
            jobs.setdefault(job.id.scheduler, []).append(job)
    found: dict[JobId, list[Allocation]] = {}
    for name, asked in jobs.items():
        for allocation in scheduler_of(name).allocations(asked):
            found.setdefault(allocation.job, []).append(allocation)
    return found


def _uses_of(run: _Run, accounts: dict[JobId, list[Allocation]]) -> list[Use]:
    allocations = [allocation for job in run.jobs for allocation in accounts.get(job.id, [])]
    own: dict[int, list[Span]] = {number: [] for number in range(len(allocations))}
    others = []
    for span in run.spans:
        here = [number for number, one in enumerate(allocations) if one.job.is_job(span.job, span.cluster)]
        nearest = min(here, key=lambda number: _distance(span, allocations[number]), default=None)
        if nearest is not None and _distance(span, allocations[nearest]) <= _NEAR_SECONDS:
            own[nearest].append(span)
        else:
            others.append(span)
    found = [use for number, one in enumerate(allocations) for use in _accounted(run, one, own[number])]
    return sorted([*found, *(_told(run, span) for span in others)], key=lambda use: use.started)


def _distance(span: Span, allocation: Allocation) -> float:
    """Return how many seconds an attempt began before or behind an allocation, 0 within it."""
    end = time.time() if allocation.end is None else allocation.end
    return max(allocation.start - span.began, span.began - end, 0.0)


def _accounted(run: _Run, allocation: Allocation, own: Sequence[Span]) -> Iterator[Use]:
    """Yield what each attempt of an allocation has used: one, or with restarts in place several, or none that spoke."""
    resources = run.spec.resources
    common: _Common = {
        **_names(run),
        "job": allocation.job.text,
        "nodes": allocation.nodes or resources.allocated_nodes,
        "gpus": resources.allocated_nodes * resources.gpus_per_node if allocation.gpus is None else allocation.gpus,
        "source": "accounting",
    }
    running, begin, left = allocation.end is None, allocation.start, allocation.seconds
    cause = "running" if running else None
    if not own:
        wasted = 0.0 if running or allocation.state is JobState.COMPLETED else left
        times = {"started": begin, "seconds": left, "wasted_seconds": wasted}
        yield Use(**common, **times, attempt=None, state=allocation.state, cause=cause)
        return
    for span, after in pairwise(own):
        seconds = min(left, max(0.0, after.began - begin))
        wasted = min(span.wasted(after.began, running=False), seconds)
        times = {"started": begin, "seconds": seconds, "wasted_seconds": wasted}
        yield Use(**common, **times, attempt=span.attempt, state=span.state, cause=span.cause or None)
        begin, left = after.began, left - seconds
    last, end = own[-1], time.time() if allocation.end is None else allocation.end
    times = {"started": begin, "seconds": left, "wasted_seconds": min(last.wasted(end, running=running), left)}
    yield Use(**common, **times, attempt=last.attempt, state=allocation.state, cause=cause or last.cause or None)


def _told(run: _Run, span: Span) -> Use:
    """Return what the run's own events say of an attempt."""
    newest = run.status.attempt == span.attempt
    running = newest and span.ended is None and run.status.state is JobState.RUNNING
    progress = read_progress(run.paths)
    heard = max(span.last, progress.get("time", 0.0) if progress.get("attempt") == span.attempt else 0.0)
    end = time.time() if running else heard if span.ended is None else span.ended
    seconds = max(0.0, end - span.began)
    resources = run.spec.resources
    return Use(
        **_names(run),
        job=span.job,
        attempt=span.attempt,
        state=JobState.RUNNING if running else span.state,
        cause="running" if running else span.cause or None,
        started=span.began,
        seconds=seconds,
        nodes=resources.allocated_nodes,
        gpus=resources.allocated_nodes * resources.gpus_per_node,
        wasted_seconds=min(span.wasted(end, running=running), seconds),
        source="events",
    )


def _names(run: _Run) -> _Names:
    return {"run": run.paths.name, "user": run.manifest.submitter, "group": run.manifest.group}


KEYS: dict[str, Callable[[Use], str]] = {
    "run": lambda use: use.run,
    "user": lambda use: use.user,
    "group": lambda use: use.group or "-",
    "state": lambda use: use.state.value,
    "cause": lambda use: use.cause or "unknown",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """What several attempts have used together."""

    word: str
    """What they have in common; `total` for all of them."""
    attempts: int
    """Number of attempts."""
    node_hours: float
    """Nodes times hours."""
    gpu_hours: float
    """GPUs times hours."""
    wasted_gpu_hours: float
    """Those of them that were wasted."""


def total(found: Sequence[Use], word: str = "total") -> Sum:
    """Return the sum of all."""
    return Sum(
        word=word,
        attempts=len(found),
        node_hours=sum(use.node_hours for use in found),
        gpu_hours=sum(use.gpu_hours for use in found),
        wasted_gpu_hours=sum(use.wasted_gpu_hours for use in found),
    )


def by_key(found: Iterable[Use], key: str, runs: Sequence[RunPaths]) -> list[Sum]:
    """Return the sum for each value of `key`, the largest first. ConfigError where there is no such key."""
    of = _word_of(key, runs)
    parts: dict[str, list[Use]] = {}
    for use in found:
        parts.setdefault(of(use), []).append(use)
    sums = [total(part, word) for word, part in parts.items()]
    return sorted(sums, key=lambda one: (-one.gpu_hours, -one.node_hours, one.word))


def _word_of(key: str, runs: Sequence[RunPaths]) -> Callable[[Use], str]:
    if key in KEYS:
        return KEYS[key]
    from launcher.contract.config.load import value_at  # late: it loads omegaconf

    known = [name for name, _ in leaf_types(RunSpec)]
    if key not in known:
        near = did_you_mean(key, [*KEYS, *known])
        raise ConfigError(f"--by {key}: neither one of {', '.join(KEYS)} nor a key of the config{near}")
    words: dict[str, str] = {}
    for paths in runs:
        try:
            value = value_at(read_resolved(paths.config), key)
        except LauncherError:
            continue
        words[paths.name] = "-" if value in (None, [], {}) else str(value)
    return lambda use: words.get(use.run, "-")
