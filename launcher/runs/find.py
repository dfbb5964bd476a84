"""Finds run directories, and reads what a run itself has written about its newest attempt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract.errors import LauncherError, RunStateError, did_you_mean
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job_state import JobState
from launcher.contract.manifest import Attempt, Manifest, read_manifest
from launcher.contract.rundir import RunPaths, read_json, read_lines
from launcher.runs.first_failure import first_failure

_PHASES = {
    "attempt_started": "preparing",
    "prepared": "starting ranks",
    "training_started": "training",
    "checkpoint_saved": "training",
    "training_finished": "exporting",
    "exported": "ending",
}

_GOES_ON = ("requeue", "resubmit", "leave")
"""Decisions (launcher/attempts/restart.py) after which another attempt follows by itself."""


def default_run_root() -> Path:
    """Where runs are looked up when nothing else is said."""
    return Path(os.environ.get("SFT_RUN_ROOT") or "runs")


def all_runs(root: Path) -> list[RunPaths]:
    """Every run in `root`, oldest first."""
    if not root.is_dir():
        return []
    found = [RunPaths(path.absolute()) for path in root.iterdir() if RunPaths(path).manifest.is_file()]
    return sorted(found, key=lambda paths: (paths.manifest.stat().st_ctime, paths.name))


def find_run(word: str, root: Path) -> RunPaths:
    """The run named `word` in `root`, or the run directory `word`."""
    for path in (root / word, Path(word)):
        if RunPaths(path).manifest.is_file():
            return RunPaths(path.absolute())
    near = did_you_mean(word, [paths.name for paths in all_runs(root)])
    raise RunStateError(f"no run {word!r} in {root.absolute()}{near} (--run-root or SFT_RUN_ROOT says where runs are)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run by its own files; no scheduler was asked."""

    paths: RunPaths
    manifest: Manifest
    job: Attempt | None
    """The newest job, from the manifest or, where a person ran job.sh or the run submitted itself, from the events."""
    attempt: str | None
    """The newest attempt of that job that has started."""
    phase: str
    exit_code: int | None
    """How that attempt ended; None while it has not, or when another one follows by itself."""
    cancelled: bool
    progress: dict[str, Any]

    @property
    def own_state(self) -> JobState | None:
        """What the run's files alone tell; None where they cannot."""
        if self.exit_code is None:
            return None
        if self.exit_code == ExitCode.OK:
            return JobState.COMPLETED
        if self.cancelled:
            return JobState.CANCELLED
        return JobState.INTERRUPTED if self.exit_code == ExitCode.REQUEUE else JobState.FAILED

    def failure(self) -> str:
        """Why the attempt failed, as far as the files tell."""
        if self.cancelled:
            return "by `launcher cancel`"
        first = first_failure(self.paths, self.attempt or "")
        who = f"{first} ended with" if first else "ended with"
        return f"{who} exit code {self.exit_code}{_meaning(self.exit_code)}"


def snapshot(paths: RunPaths) -> Snapshot:
    """Read the run's manifest, events and progress."""
    manifest = read_manifest(paths)
    events = list(read_lines(paths.events))
    job = _newest_job(manifest, events)
    job_id = job.job_id if job else None
    mine = [event for event in events if event.get("event") == "attempt_started" and event.get("job_id") == job_id]
    attempt = str(mine[-1]["attempt"]) if mine else None
    since = events[events.index(mine[-1]) :] if mine else []
    own = [event for event in since if event.get("attempt", attempt) == attempt]
    ended = [event for event in own if event.get("event") == "attempt_ended"]
    if any(event.get("event") == "restart_decided" and event.get("decision") in _GOES_ON for event in own):
        ended = []  # of its job that attempt was not the last
    progress = read_json(paths.progress)
    return Snapshot(
        paths=paths,
        manifest=manifest,
        job=job,
        attempt=attempt,
        phase=next((_PHASES[event["event"]] for event in reversed(own) if event.get("event") in _PHASES), ""),
        exit_code=int(ended[-1].get("exit_code", ExitCode.FAILURE)) if ended else None,
        cancelled=any(event.get("event") == "cancelled" and event.get("job_id") == job_id for event in events),
        progress=progress if isinstance(progress, dict) else {},
    )


def _newest_job(manifest: Manifest, events: list[dict[str, Any]]) -> Attempt | None:
    known = {attempt.job_id for attempt in manifest.attempts}
    last = manifest.attempts[-1] if manifest.attempts else None
    for event in reversed(events):
        if event.get("event") in ("attempt_started", "submitted") and str(event.get("job_id")) not in known:
            if last is None or event["time"] >= last.submitted_at:
                scheduler = "local" if str(event.get("attempt")).startswith("local-") else "slurm"
                return Attempt(job_id=str(event["job_id"]), scheduler=scheduler, submitted_at=event["time"])
            break
    return last


def _meaning(code: int | None) -> str:
    meanings = {
        ExitCode.BAD_INPUT: " (bad input)",
        ExitCode.IO_ERROR: " (could not write; is the disk full?)",
        ExitCode.REQUEUE: " (stopped on request, checkpoint complete)",
        ExitCode.HANG: " (no rank finished a step in time)",
        ExitCode.BAD_NODE: " (a node failed its preflight)",
        ExitCode.NEVER_REQUEUE: " (never to be started again by itself)",
    }
    if code is not None and code > 128:
        return f" (signal {code - 128})"
    return meanings.get(ExitCode(code), "") if code in set(ExitCode) else ""


def listing(runs: Sequence[RunPaths]) -> list[dict[str, Any]]:
    """What `launcher list` shows: name, state by the run's own files, creation time, topology, lineage."""
    rows = []
    for paths in runs:
        try:
            item = snapshot(paths)
        except (LauncherError, ValueError, KeyError) as error:
            rows.append(_unreadable(paths, error))
            continue
        state = item.own_state or (JobState.CANCELLED if item.cancelled else None)
        rows.append(
            {
                "run": item.paths.name,
                "directory": str(item.paths.root),
                "state": state.value if state else (item.phase or None),
                "created_at": item.manifest.created_at,
                "topology": item.manifest.topology.get("summary", ""),
                "parent_run": item.manifest.parent_run,
            }
        )
    return rows


def _unreadable(paths: RunPaths, error: Exception) -> dict[str, Any]:
    """The row of a run whose files are damaged; the others are listed all the same."""
    return {
        "run": paths.name,
        "directory": str(paths.root),
        "state": JobState.UNKNOWN.value,
        "created_at": paths.root.stat().st_mtime,
        "topology": f"unreadable: {error}",
        "parent_run": None,
    }
