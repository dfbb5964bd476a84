"""Gathers what an attempt left behind, for `launcher.attempts.cause`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts.cause import Evidence
from launcher.contract.job import AttemptName
from launcher.contract.rank_error import read_error
from launcher.contract.rundir import RunPaths
from launcher.scheduler.base import JobView, Scheduler

_TAIL_BYTES = 1 << 15
_SIGNAL = 128
"""Exit codes above it belong to processes that a signal ended."""


def gather(
    paths: RunPaths,
    scheduler: Scheduler,
    attempt: str,
    exit_code: int,
    job: JobView | None,
    job_id: str,
    events: Sequence[Mapping[str, Any]],
) -> Evidence:
    """Return the evidence of how `attempt` of the job `job_id` ended. `job` is the scheduler's view of that job."""
    own = [event for event in events if event.get("attempt") == attempt]
    stop: Mapping[str, Any] = next((event for event in reversed(own) if event.get("event") == "stop_requested"), {})
    preflight: Mapping[str, Any] = next(
        (event for event in reversed(own) if event.get("event") == "preflight_failed"), {}
    )
    rank, host = _first_failure(paths.failure(attempt))
    error = read_error(paths.error(attempt))
    if error is not None and exit_code > _SIGNAL and rank not in (None, error.rank):
        error = None  # a killed rank records no error, so this one is of a rank that failed after it
    logs = [paths.logs / attempt / "batch.log", *([paths.rank_log(attempt, rank)] if rank is not None else [])]
    log = "\n".join(_tail(file) for file in logs)
    return Evidence(
        exit_code=exit_code,
        restart=AttemptName(attempt).restart or 0,
        requeues=scheduler.capabilities.requeues,
        cancelled=any(event.get("event") == "cancelled" and event.get("job_id") == job_id for event in events),
        stop_signal=str(stop.get("signal") or ""),
        stop_deadline=bool(stop.get("deadline")),
        bad_nodes=tuple(
            str(node["host"]) for node in preflight.get("nodes", []) if isinstance(node, Mapping) and "host" in node
        ),
        host=host,
        job=job,
        ended_as=scheduler.read_log(log),
        error=error,
        log=log,
    )


def _first_failure(file: Path) -> tuple[int | None, str]:
    """Return rank and host of the first rank that failed, or None and an empty string."""
    try:
        _, rank, host = file.read_text(encoding="utf-8").split()
        return int(rank), host
    except (OSError, ValueError):
        return None, ""


def _tail(file: Path) -> str:
    try:
        with file.open("rb") as log:
            log.seek(0, 2)
            log.seek(max(0, log.tell() - _TAIL_BYTES))
            return log.read().decode(errors="replace")
    except OSError:
        return ""
