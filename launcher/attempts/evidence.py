"""Gathers what an attempt left behind, for `launcher.attempts.cause`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts.cause import Evidence, JobView, RankError
from launcher.contract.rundir import RunPaths

_TAIL_BYTES = 1 << 15
_SIGNAL = 128
"""Exit codes above it are of processes that a signal ended."""
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(\S*)")


def parse_job(text: str) -> JobView | None:
    """The answer of `scontrol show job -o`; None where it did not answer."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        fields.setdefault(name, value)  # the first is Slurm's; a command line behind it may look like fields too
    if "JobState" not in fields:
        return None
    restarts = fields.get("Restarts", "")
    return JobView(
        state=fields["JobState"],
        restarts=int(restarts) if restarts.isdigit() else 0,
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", ""),
        excluded="" if fields.get("ExcNodeList") in (None, "(null)") else fields["ExcNodeList"],
    )


def gather(
    paths: RunPaths,
    attempt: str,
    exit_code: int,
    job: JobView | None,
    job_id: str,
    events: Sequence[Mapping[str, Any]],
) -> Evidence:
    """The evidence of how `attempt` ended."""
    own = [event for event in events if event.get("attempt") == attempt]
    stop: Mapping[str, Any] = next((event for event in reversed(own) if event.get("event") == "stop_requested"), {})
    preflight: Mapping[str, Any] = next(
        (event for event in reversed(own) if event.get("event") == "preflight_failed"), {}
    )
    rank, host = _first_failure(paths.failure(attempt))
    error = read_error(paths.error(attempt))
    if error is not None and exit_code > _SIGNAL and rank not in (None, error.rank):
        error = None  # a rank that was killed records none, so this is a victim's
    logs = [paths.logs / attempt / "batch.log", *([paths.rank_log(attempt, rank)] if rank is not None else [])]
    return Evidence(
        exit_code=exit_code,
        restart=restart_of(attempt),
        local=attempt.startswith("local-"),
        cancelled=any(event.get("event") == "cancelled" and event.get("job_id") == job_id for event in events),
        stop_signal=str(stop.get("signal") or ""),
        stop_deadline=bool(stop.get("deadline")),
        bad_nodes=tuple(str(node["host"]) for node in preflight.get("nodes", [])),
        host=host,
        job=job,
        error=error,
        log="\n".join(_tail(file) for file in logs),
    )


def restart_of(attempt: str) -> int:
    """How often Slurm had started the job before the attempt `<job id>.<count>`."""
    count = attempt.rpartition(".")[2]
    return int(count) if count.isdigit() and not attempt.startswith("local-") else 0


def read_error(file: Path) -> RankError | None:
    """The first error that a rank recorded."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        kinds = tuple(str(kind) for kind in values["kinds"])
        return RankError(kinds=kinds, message=values["message"], rank=values["rank"], host=values["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _first_failure(file: Path) -> tuple[int | None, str]:
    """Rank and host of the first rank that failed."""
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
