"""What a run itself has written about its newest job: manifest, events, progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.contract.errors import RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import AttemptName, Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.manifest import Manifest, read_manifest
from launcher.contract.records import read_events, read_progress
from launcher.contract.rundir import RunPaths
from launcher.contract.schedulers import SchedulerName, scheduler_name
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Snapshot:
    """A run as its own files tell it; no scheduler was asked."""

    paths: RunPaths
    manifest: Manifest
    job: Job | None
    """The newest job: from the manifest or, where a person ran job.sh or the run submitted itself, from the events."""
    attempt: str | None
    """Name of the newest attempt of that job that has started."""
    phase: str
    exit_code: int | None
    """How that attempt ended; None if it has not, or if another one follows by itself."""
    cancelled: bool
    progress: dict[str, Any]

    @property
    def own_state(self) -> JobState | None:
        """The state that the files alone tell, or None where they do not."""
        if self.exit_code is None:
            return None
        if self.exit_code == ExitCode.OK:
            return JobState.COMPLETED
        if self.cancelled:
            return JobState.CANCELLED
        return JobState.INTERRUPTED if self.exit_code == ExitCode.REQUEUE else JobState.FAILED

    def failure(self) -> str:
        """Return why the attempt failed, as far as the files tell."""
        if self.cancelled:
            return "by `launcher cancel`"
        first = first_failure(self.paths, self.attempt or "")
        who = f"{first} ended with" if first else "ended with"
        return f"{who} exit code {self.exit_code}{_meaning(self.exit_code)}"


def snapshot(paths: RunPaths) -> Snapshot:
    """Read the manifest, events and progress of a run. RunStateError where the manifest or an event's job cannot be."""
    manifest = read_manifest(paths)
    events = read_events(paths)
    job = _newest_job(manifest, events)
    job_id = job.id.text if job else None
    starts = [event for event in events if _starts_attempt(event) and event.get("job_id") == job_id]
    attempt = str(starts[-1]["attempt"]) if starts else None
    since = events[events.index(starts[-1]) :] if starts else []
    own = [event for event in since if event.get("attempt", attempt) == attempt]
    ends = [event for event in own if event.get("event") == "attempt_ended"]
    if any(event.get("event") == "restart_decided" and event.get("decision") in _GOES_ON for event in own):
        ends = []  # another attempt of the same job follows
    return Snapshot(
        paths=paths,
        manifest=manifest,
        job=job,
        attempt=attempt,
        phase=next((_PHASES[event["event"]] for event in reversed(own) if event.get("event") in _PHASES), ""),
        exit_code=_exit_code(ends[-1]) if ends else None,
        cancelled=any(event.get("event") == "cancelled" and event.get("job_id") == job_id for event in events),
        progress=read_progress(paths),
    )


def _starts_attempt(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "attempt_started" and isinstance(event.get("attempt"), str)


def _exit_code(end: Mapping[str, Any]) -> int:
    code = end.get("exit_code")
    return code if type(code) is int else ExitCode.FAILURE


def _newest_job(manifest: Manifest, events: Sequence[Mapping[str, Any]]) -> Job | None:
    """Return the last job that the manifest or the events name."""
    recorded = {job.id.text for job in manifest.jobs}
    last = manifest.jobs[-1] if manifest.jobs else None
    named = [
        event
        for event in events
        if event.get("event") in ("attempt_started", "submitted") and isinstance(event.get("job_id"), str)
    ]
    for event in reversed(named):
        if event["job_id"] not in recorded:
            if last is None or event["time"] >= last.submitted_at:
                return Job(id=JobId(event["job_id"], _scheduler_of(event)), submitted_at=event["time"])
            break
    return last


def _scheduler_of(event: Mapping[str, Any]) -> SchedulerName:
    """Return the scheduler of an event's job. Raise RunStateError where it is none of ours."""
    if "scheduler" in event:
        try:
            return scheduler_name(event["scheduler"])
        except ValueError as error:
            raise RunStateError(f"events name job {event['job_id']}, and {error}") from None
    return AttemptName(str(event.get("attempt"))).scheduler


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
