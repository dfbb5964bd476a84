"""State of runs: the scheduler's word merged with what each run wrote itself.

However many runs are shown, Slurm is asked at most twice (`launcher.scheduler.queries`): one squeue for all jobs whose
end is not known, and one sacct for those squeue has forgotten. A job in neither answer is judged by its own last event,
or is UNKNOWN; it is never taken for finished because nobody mentions it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher.contract.errors import LauncherError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.find import Snapshot, snapshot
from launcher.scheduler import local
from launcher.scheduler.queries import Answer, ask
from launcher.scheduler.slurm import JobRecord

_ADVICE = {
    "DependencyNeverSatisfied": "DependencyNeverSatisfied: it will never start; cancel it",
    "BeginTime": "BeginTime: Slurm waits a while before it starts a requeued job again",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One row of the table."""

    run: str
    directory: str
    state: JobState
    attempt: str | None = None
    job: str | None = None
    scheduler: str | None = None
    step: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    checkpoint: str | None = None
    mfu: float | None = None
    exit_code: int | None = None
    reason: str = ""
    expected_start: str | None = None
    """When Slurm means to start a waiting job, local time; None where it has not planned it yet."""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "state": self.state.value}


def collect(runs: Sequence[RunPaths], *, fresh: bool = False) -> tuple[list[RunStatus], str | None]:
    """State of every run, and the scheduler's complaint if it could not be asked.

    `fresh` is for who acts on the answer; others may get one that is some seconds old.
    """
    rows: list[RunStatus] = []
    readable: list[Snapshot] = []
    for paths in runs:
        try:
            readable.append(snapshot(paths))
        except (LauncherError, ValueError, KeyError) as error:
            reason = f"unreadable: {error}"
            rows.append(RunStatus(run=paths.name, directory=str(paths.root), state=JobState.UNKNOWN, reason=reason))
    answer = _ask(readable, fresh)
    rows += [_row(item, answer) for item in readable]
    order = {str(paths.root): place for place, paths in enumerate(runs)}
    return sorted(rows, key=lambda row: order[row.directory]), answer.problem


def _ask(snapshots: Sequence[Snapshot], fresh: bool) -> Answer:
    """Slurm's records of all jobs that may still change."""
    waiting = [item for item in snapshots if item.own_state is not JobState.COMPLETED]
    jobs = {item.job.job_id: item.job.submitted_at for item in waiting if item.job and item.job.scheduler == "slurm"}
    return ask(jobs, _owners(waiting), fresh=fresh)


def _owners(snapshots: Sequence[Snapshot]) -> list[int]:
    """User ids of whoever submitted these runs; this user's in any case."""
    owners = {os.getuid()}
    for name in {item.manifest.submitter for item in snapshots} - {os.environ.get("LOGNAME"), os.environ.get("USER")}:
        with contextlib.suppress(KeyError):
            owners.add(pwd.getpwnam(name).pw_uid)
    return sorted(owners)


def _record_of(item: Snapshot, answer: Answer) -> JobRecord | None:
    """Slurm's record of the run's job; not that of another job to which Slurm gave the same id."""
    record = answer.records.get(item.job.job_id) if item.job else None
    return None if record is not None and record.name not in ("", item.manifest.name, item.manifest.group) else record


def _judge(item: Snapshot, record: JobRecord | None, answer: Answer) -> tuple[JobState, str]:
    """State and reason of a run."""
    if item.job is None:
        return JobState.UNKNOWN, "no job is recorded"
    if item.own_state is JobState.COMPLETED:
        return JobState.COMPLETED, ""
    if item.job.scheduler == "local":
        return _judge_local(item)
    if record is not None:
        return _judge_record(item, record)
    if item.own_state is not None:
        return item.own_state, item.failure()
    if item.cancelled and answer.problem is None:
        return JobState.CANCELLED, item.failure()  # Slurm kills what does not end in time, the batch script too
    silence = "Slurm knows the job no more, and it left no word of its end"
    return JobState.UNKNOWN, answer.problem or answer.doubt or silence


def _judge_record(item: Snapshot, record: JobRecord) -> tuple[JobState, str]:
    state, reason = record.state, _ADVICE.get(record.reason, record.reason)
    if state is JobState.HELD:
        return state, f"{record.reason}: waits for `scontrol release {record.job_id}`"
    if state is JobState.FAILED and item.own_state is not None:
        return item.own_state, item.failure()
    if state is JobState.FAILED and record.exit_code is not None:
        return state, f"ended with exit code {record.exit_code}"
    if state is JobState.RUNNING:
        return state, item.phase
    if state in (JobState.COMPLETED, JobState.CANCELLED):
        return state, ""  # squeue goes on showing why the job once waited
    return state, reason


def _judge_local(item: Snapshot) -> tuple[JobState, str]:
    assert item.job is not None
    if item.own_state is not None:
        return item.own_state, item.failure()
    if not item.job.host:
        return JobState.UNKNOWN, "started by hand, and not ended"
    if not local.is_here(item.job):
        return JobState.UNKNOWN, f"it runs on {item.job.host}; look there"
    if local.is_alive(item.job):
        return JobState.RUNNING, item.phase
    again = snapshot(item.paths)  # it may have ended between the two looks
    if again.own_state is not None:
        return again.own_state, "" if again.own_state is JobState.COMPLETED else again.failure()
    return JobState.FAILED, f"process {item.job.job_id} is gone and left no word of its end"


def _row(item: Snapshot, answer: Answer) -> RunStatus:
    record = _record_of(item, answer) if item.job and item.job.scheduler == "slurm" else None
    state, reason = _judge(item, record, answer)
    progress = item.progress
    checkpoints = item.paths.complete_checkpoints()
    return RunStatus(
        run=item.paths.name,
        directory=str(item.paths.root),
        state=state,
        attempt=item.attempt,
        job=item.job.job_id if item.job else None,
        scheduler=item.job.scheduler if item.job else None,
        step=progress.get("step"),
        max_steps=progress.get("max_steps"),
        loss=progress.get("loss"),
        tokens_per_second=progress.get("tokens_per_second"),
        mfu=progress.get("mfu"),
        eta_seconds=progress.get("eta_seconds") if state is JobState.RUNNING else None,
        checkpoint=checkpoints[-1].name if checkpoints else None,
        exit_code=item.exit_code,
        reason=reason,
        expected_start=record.expected_start if record and state is JobState.PENDING else None,
    )
