"""What is about to be submitted, written down before it is, so that its job is found again after a kill.

Each submission has a random token. It is on disk before the scheduler is called and travels with the job (for Slurm in
`--comment`, which is also part of the command line that accounting keeps; a local run has it in its environment). A
submission that was begun and not recorded is looked for by its token: in the run's own events, then at the scheduler.
The job is said not to exist only when all of them have answered, no process of the submission is left that could still
make one, and the scheduler has had time to show what it was sent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import time
from collections.abc import Sequence

from launcher.contract import processes
from launcher.contract.errors import RunStateError
from launcher.contract.job import Job, JobId
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths, read_json, write_json
from launcher.contract.schedulers import SchedulerName, scheduler_name
from launcher.scheduler.base import Intent, Scheduler
from launcher.scheduler.factory import scheduler_of

_CLOCK_SKEW = 60.0  # between login and compute nodes


def begin(paths: RunPaths, scheduler: SchedulerName, clusters: str = "", candidate: str = "") -> Intent:
    """Write down, durably, that a job is about to be submitted. `clusters` are those that may get it.

    `candidate` is the one of a race whose job it is.
    """
    intent = Intent(
        token=f"sft-{secrets.token_hex(16)}",
        scheduler=scheduler,
        written_at=time.time(),
        host=socket.gethostname(),
        clusters=clusters,
        candidate=candidate,
    )
    write_json(paths.submission, dataclasses.asdict(intent))
    return intent


def pending(paths: RunPaths) -> Intent | None:
    """Return the submission that was begun and is not known to have ended."""
    try:
        values = read_json(paths.submission)
        if values is None:
            return None
        return Intent(**{**values, "scheduler": scheduler_name(values["scheduler"])})
    except (ValueError, TypeError, KeyError) as error:
        raise RunStateError(f"{paths.submission} cannot be read: {error}") from None


def end(paths: RunPaths) -> None:
    """Forget the submission: its job is recorded, or there is none."""
    with contextlib.suppress(FileNotFoundError):
        paths.submission.unlink()


def find_job(paths: RunPaths, name: str, recorded: Sequence[Job], intent: Intent) -> Job | None:
    """Return the job of a submission, or None when it is certain that there is none and will be none.

    `name` is the job's name, `recorded` are the jobs that the run is known to have. Waits while nothing is certain.
    SchedulerError where the scheduler does not answer.
    """
    known = next((job for job in recorded if job.id.token == intent.token), None)
    if known is not None:
        return known
    scheduler = scheduler_of(intent.scheduler)
    quiet_since: float | None = None
    while True:
        now = time.time()
        settled = now >= _settled_by(scheduler, intent)
        if quiet_since is None and (settled or not _may_be_at_work(intent)):
            quiet_since = now
        certain = settled or (quiet_since is not None and now >= quiet_since + scheduler.settle_seconds)
        job = scheduler.find(name, intent, _started(paths, recorded, intent))
        if job is not None or certain:
            return job
        time.sleep(min(1.0, scheduler.settle_seconds))


def _settled_by(scheduler: Scheduler, intent: Intent) -> float:
    """Return when the submission has ended, whatever happened, and the scheduler shows all that came of it."""
    return intent.written_at + scheduler.submit_seconds + scheduler.settle_seconds


def _may_be_at_work(intent: Intent) -> bool:
    """Return whether a process of the submission may still run. From another machine only time can tell."""
    return intent.host != socket.gethostname() or bool(processes.with_text(intent.token))


def _started(paths: RunPaths, recorded: Sequence[Job], intent: Intent) -> JobId | None:
    """Return the job that has reported its start since the intent: nobody else submits to this run."""
    events = list(read_events(paths))
    # The run may have submitted itself before; those jobs are in its events alone.
    by_itself = {str(event.get("job_id")) for event in events if event.get("event") == "submitted"}
    for event in events:
        late_enough = float(event.get("time", 0)) >= intent.written_at - _CLOCK_SKEW
        if event.get("event") != "attempt_started" or not late_enough:
            continue
        number, cluster = str(event.get("job_id")), str(event.get("cluster") or "")
        if number not in by_itself and not any(job.id.is_job(number, cluster) for job in recorded):
            return JobId(number, intent.scheduler, intent.token, cluster)
    return None
