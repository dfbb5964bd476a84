"""What a run itself has written about its newest job: manifest, events, progress."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.contract import race
from launcher.contract.errors import RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import AttemptName, Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.manifest import Manifest, read_manifest
from launcher.contract.records import read_events, read_progress
from launcher.contract.rundir import JsonObject, RunPaths
from launcher.contract.schedulers import SchedulerName, scheduler_name
from launcher.runs.first_failure import first_error, first_failure

_PHASES = {
    "attempt_started": "preparing",
    "prepared": "starting ranks",
    "training_started": "training",
    "checkpoint_saved": "training",
    "training_finished": "exporting",
    "exported": "ending",
}

_GOES_ON = ("requeue", "in_place", "resubmit", "leave")
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
    rivals: tuple[Job, ...] = ()
    """The other jobs of a race that none of them has won yet (`submit --first-of`)."""
    detail: str = ""
    """Why the attempt ended before it had the run, in the batch script's words."""

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

    @property
    def numbers(self) -> dict[str, Any]:
        """The newest numbers, if they are of the newest attempt: an earlier one's say nothing of this one."""
        return self.progress if self.progress.get("attempt", self.attempt) == self.attempt else {}

    def failure(self) -> str:
        """Return why the attempt failed, as far as the files tell."""
        if self.cancelled:
            return "by `launcher cancel`"
        code = f"exit code {self.exit_code}{meaning_of(self.exit_code)}"
        first, error = first_failure(self.paths, self.attempt or ""), first_error(self.paths, self.attempt or "")
        if self.detail or error is not None:
            said = self.detail or (error.sentence if error is not None else "")
            inner = code.replace(" (", ", ").removesuffix(")")
            return f"{first}: {said} ({inner})" if first else f"{said} ({inner})"
        return f"{first} ended with {code}" if first else f"ended with {code}"


def snapshot(paths: RunPaths) -> Snapshot:
    """Read the manifest, events and progress of a run. RunStateError where the manifest or an event's job cannot be."""
    manifest, events, rivals = _without_losers(paths, read_manifest(paths), read_events(paths))
    job = _newest_job(manifest, events)
    of_job = [event for event in events if job is not None and job.id.is_job(event.get("job_id"), event.get("cluster"))]
    starts = [event for event in of_job if _starts_attempt(event)]
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
        cancelled=any(event.get("event") == "cancelled" for event in of_job),
        progress=read_progress(paths),
        rivals=rivals,
        detail=str(ends[-1].get("detail", "")) if ends else "",
    )


def _without_losers(
    paths: RunPaths, manifest: Manifest, events: Sequence[JsonObject]
) -> tuple[Manifest, list[JsonObject], tuple[Job, ...]]:
    """Return manifest and events without a race's losers, and while it is open the jobs behind its first."""
    candidates = race.entries(events)
    if not candidates:
        return manifest, list(events), ()

    def others(left_out: Collection[JsonObject]) -> tuple[Manifest, list[JsonObject]]:
        names = [(event["job_id"], event.get("cluster", "")) for event in left_out]
        jobs = tuple(job for job in manifest.jobs if not any(job.id.is_job(*name) for name in names))
        told = [event for event in events if (event.get("job_id"), event.get("cluster", "")) not in names]
        return dataclasses.replace(manifest, jobs=jobs), told

    won = race.winner(paths)
    if won is not None:
        return *others([event for name, event in candidates.items() if name != won]), ()
    submitted = [event for event in events if event.get("event") == "submitted"]
    if not submitted[-1].get("candidate"):  # none of them started, and the run was submitted again
        return manifest, list(events), ()
    behind = list(candidates.values())[1:]
    rivals = [job for job in manifest.jobs if any(job.id.is_job(e["job_id"], e.get("cluster", "")) for e in behind)]
    return *others(behind), tuple(rivals)


def _starts_attempt(event: Mapping[str, Any]) -> bool:
    return event.get("event") == "attempt_started" and isinstance(event.get("attempt"), str)


def _exit_code(end: Mapping[str, Any]) -> int:
    code = end.get("exit_code")
    return code if type(code) is int else ExitCode.FAILURE


def all_jobs(manifest: Manifest, events: Sequence[Mapping[str, Any]]) -> list[Job]:
    """Return every job that the manifest or the events name, those of the manifest first."""
    jobs = list(manifest.jobs)
    for event in events:
        number, cluster = event.get("job_id"), str(event.get("cluster") or "")
        if event.get("event") not in ("attempt_started", "submitted") or not isinstance(number, str):
            continue
        if not any(job.id.is_job(number, cluster) for job in jobs):
            job_id = JobId(number, _scheduler_of(event), _token_of(events, number, cluster), cluster)
            jobs.append(Job(id=job_id, submitted_at=event["time"]))
    return jobs


def _newest_job(manifest: Manifest, events: Sequence[Mapping[str, Any]]) -> Job | None:
    """Return the last job that the manifest or the events name."""
    last = manifest.jobs[-1] if manifest.jobs else None
    for event in reversed(events):
        if event.get("event") not in ("attempt_started", "submitted") or not isinstance(event.get("job_id"), str):
            continue
        number, cluster = event["job_id"], str(event.get("cluster") or "")
        if any(job.id.is_job(number, cluster) for job in manifest.jobs):
            continue
        if last is not None and event["time"] < last.submitted_at:
            break
        token = _token_of(events, number, cluster)
        return Job(id=JobId(number, _scheduler_of(event), token, cluster), submitted_at=event["time"])
    return last


def _token_of(events: Sequence[Mapping[str, Any]], number: str, cluster: str) -> str:
    """Return the token of a job that the run has submitted itself, or an empty text."""
    own = (event for event in events if event.get("event") == "submitted" and event.get("job_id") == number)
    return next((str(event.get("token", "")) for event in own if event.get("cluster", cluster) == cluster), "")


def _scheduler_of(event: Mapping[str, Any]) -> SchedulerName:
    """Return the scheduler of an event's job. Raise RunStateError where it is none of ours."""
    if "scheduler" in event:
        try:
            return scheduler_name(event["scheduler"])
        except ValueError as error:
            raise RunStateError(f"events name job {event['job_id']}, and {error}") from None
    return AttemptName(str(event.get("attempt"))).scheduler


_OF_SHELLS = {
    126: " (a program could not be run)",
    127: " (a program was not found)",
    128 + 24: " (signal 24: a limit of CPU time, `ulimit -t`)",
}


def meaning_of(code: int | None) -> str:
    """Return what an exit code means, in words to put behind it, or an empty text."""
    meanings = {
        ExitCode.BAD_INPUT: " (bad input)",
        ExitCode.IO_ERROR: " (could not write; is the disk full?)",
        ExitCode.REQUEUE: " (stopped on request, checkpoint complete)",
        ExitCode.HANG: " (no rank finished a step in time)",
        ExitCode.BAD_NODE: " (a node failed its preflight)",
        ExitCode.NEVER_REQUEUE: " (never to be started again by itself)",
    }
    if code in _OF_SHELLS:
        return _OF_SHELLS[code]
    if code is not None and code > 128:
        return f" (signal {code - 128})"
    return meanings.get(ExitCode(code), "") if code in set(ExitCode) else ""
