"""State of runs: the scheduler's word merged with what each run wrote itself.

However many runs are shown, Slurm is asked at most twice: one squeue for all jobs whose end is not known, and one sacct
for those squeue has forgotten. A job in neither answer is judged by its own last event, or is UNKNOWN; it is never
taken for finished because nobody mentions it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launcher import processes, slurm
from launcher.errors import LauncherError, SchedulerError
from launcher.rundir import RunPaths
from launcher.runs import Snapshot, snapshot
from launcher.slurm import JobRecord
from launcher.state import JobState

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
    exit_code: int | None = None
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """For --json."""
        return {**dataclasses.asdict(self), "state": self.state.value}


def collect(runs: Sequence[RunPaths]) -> tuple[list[RunStatus], str | None]:
    """State of every run, and the scheduler's complaint if it could not be asked."""
    rows: list[RunStatus] = []
    readable: list[Snapshot] = []
    for paths in runs:
        try:
            readable.append(snapshot(paths))
        except (LauncherError, ValueError, KeyError) as error:
            reason = f"unreadable: {error}"
            rows.append(RunStatus(run=paths.name, directory=str(paths.root), state=JobState.UNKNOWN, reason=reason))
    records, problem = _ask(readable)
    rows += [_row(item, *_judge(item, records, problem)) for item in readable]
    order = {str(paths.root): place for place, paths in enumerate(runs)}
    return sorted(rows, key=lambda row: order[row.directory]), problem


def _ask(snapshots: Sequence[Snapshot]) -> tuple[dict[str, JobRecord], str | None]:
    """Slurm's records of all jobs that may still change."""
    open_ids = [
        item.job.job_id
        for item in snapshots
        if item.job is not None and item.job.scheduler == "slurm" and item.own_state is not JobState.COMPLETED
    ]
    try:
        records = slurm.queue(open_ids)
    except SchedulerError as error:
        return {}, str(error)
    return {**slurm.accounting([job for job in open_ids if job not in records]), **records}, None


def _judge(item: Snapshot, records: dict[str, JobRecord], problem: str | None) -> tuple[JobState, str]:
    """State and reason of a run."""
    if item.job is None:
        return JobState.UNKNOWN, "no job is recorded"
    if item.own_state is JobState.COMPLETED:
        return JobState.COMPLETED, ""
    if item.job.scheduler == "local":
        return _judge_local(item)
    record = records.get(item.job.job_id)
    if record is not None and record.name not in ("", item.manifest.name):
        record = None  # job ids are used again
    if record is not None:
        return _judge_record(item, record)
    if item.own_state is not None:
        return item.own_state, item.failure()
    if item.cancelled and problem is None:
        return JobState.CANCELLED, item.failure()  # Slurm kills what does not end in time, the batch script too
    return JobState.UNKNOWN, problem or "Slurm knows the job no more, and it left no word of its end"


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
    if not processes.is_here(item.job):
        return JobState.UNKNOWN, f"it runs on {item.job.host}; look there"
    if processes.is_alive(item.job):
        return JobState.RUNNING, item.phase
    again = snapshot(item.paths)  # it may have ended between the two looks
    if again.own_state is not None:
        return again.own_state, "" if again.own_state is JobState.COMPLETED else again.failure()
    return JobState.FAILED, f"process {item.job.job_id} is gone and left no word of its end"


def _row(item: Snapshot, state: JobState, reason: str) -> RunStatus:
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
        eta_seconds=progress.get("eta_seconds") if state is JobState.RUNNING else None,
        checkpoint=checkpoints[-1].name if checkpoints else None,
        exit_code=item.exit_code,
        reason=reason,
    )


def table(rows: Sequence[RunStatus]) -> str:
    """Aligned columns, one row a run."""
    head = ("RUN", "STATE", "ATTEMPT", "JOB", "STEP", "LOSS", "TOKENS/S", "ETA", "CHECKPOINT", "REASON")
    return columns([head, *(_cells(row) for row in rows)])


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Text columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cells(row: RunStatus) -> tuple[str, ...]:
    return (
        row.run,
        row.state.value,
        row.attempt or "-",
        row.job or "-",
        "-" if row.step is None else f"{row.step}/{row.max_steps or '?'}",
        "-" if row.loss is None else f"{row.loss:.4f}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "-" if row.eta_seconds is None else duration(row.eta_seconds),
        row.checkpoint or "-",
        row.reason,
    )


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
