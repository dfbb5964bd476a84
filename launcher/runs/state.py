"""States of runs: the scheduler's records merged with what each run wrote itself.

Each scheduler is asked once for all runs whose end is not known. A job without a record has the state of its own last
event, or is UNKNOWN; it is never taken for finished because the scheduler does not mention it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pwd
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.contract.errors import LauncherError
from launcher.contract.job import AttemptName, Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths, checkpoint_step
from launcher.contract.schedulers import CAPABILITIES, SchedulerName
from launcher.runs.snapshot import Snapshot, snapshot
from launcher.scheduler.base import Answer, JobRecord
from launcher.scheduler.factory import scheduler_of

_SILENT_MINUTES = 15
"""More than an owner may be silent before its lease counts as void, since clocks of nodes and file systems differ."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One row of the table."""

    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    state: JobState
    """State of its newest job."""
    attempt: str | None = None
    """Its newest attempt that has started."""
    job: str | None = None
    """Id of its newest job, as the scheduler writes it."""
    scheduler: SchedulerName | None = None
    """Whose id it is."""
    cluster: str = ""
    """The cluster that the job was sent to, where Slurm has several; empty for the one at hand."""
    step: int | None = None
    """Optimizer steps done in the newest attempt, or those of the checkpoint that it goes on from."""
    max_steps: int | None = None
    """Steps in all."""
    loss: float | None = None
    """Of the newest logged step; null also where it is no finite number."""
    tokens_per_second: float | None = None
    """Of all ranks, since the last logged step."""
    eta_seconds: float | None = None
    """Seconds until the last step, of a run that is at work."""
    checkpoint: str | None = None
    """Its newest complete checkpoint."""
    mfu: float | None = None
    """Share of the GPUs' peak that the model's own products took."""
    first_step_seconds: float | None = None
    """How long after its submission the newest attempt had done its first step."""
    exit_code: int | None = None
    """How the newest attempt ended; null while it has not, or if another one follows by itself."""
    reason: str = ""
    """Why it waits, how far it has come, or why it failed."""
    expected_start: str | None = None
    """When the scheduler means to start a waiting job, local time; None where it has not planned it yet."""

    @property
    def job_id(self) -> JobId | None:
        """The newest job of the run."""
        if self.job is None or self.scheduler is None:
            return None
        return JobId(self.job, self.scheduler, cluster=self.cluster)

    @property
    def may_run_unseen(self) -> bool:
        """Whether the state is unknown although the scheduler drops no jobs, so that the job may be at work."""
        if self.state is not JobState.UNKNOWN or self.scheduler is None:
            return False
        return not CAPABILITIES[self.scheduler].forgets_jobs


def collect(runs: Sequence[RunPaths], *, fresh: bool = False) -> tuple[list[RunStatus], str | None]:
    """Return the state of every run, in order, and why a scheduler could not be asked, if so.

    An answer may be some seconds old; with `fresh`, for callers that act on it, it is not.
    """
    rows: dict[RunPaths, RunStatus] = {}
    readable: list[Snapshot] = []
    for paths in runs:
        try:
            readable.append(snapshot(paths))
        except (LauncherError, ValueError, KeyError) as error:
            reason = f"unreadable: {error}"
            rows[paths] = RunStatus(run=paths.name, directory=str(paths.root), state=JobState.UNKNOWN, reason=reason)
    answers = _ask(readable, fresh)
    rows |= {item.paths: _row(item, answers) for item in readable}
    problems = [answer.problem for answer in answers.values() if answer.problem is not None]
    return [rows[paths] for paths in runs], "\n".join(problems) or None


def _ask(snapshots: Sequence[Snapshot], fresh: bool) -> dict[SchedulerName, Answer]:
    """Ask each scheduler once, for all jobs that may still change."""
    jobs: dict[SchedulerName, list[Job]] = {}
    going_on = [(item, item.job) for item in snapshots if item.job is not None and not _is_over(item)]
    for item, job in going_on:
        jobs.setdefault(job.id.scheduler, []).extend([job, *item.rivals])
    owners = _owners([item for item, _ in going_on])
    return {name: scheduler_of(name).states(asked, owners, fresh=fresh) for name, asked in jobs.items()}


def _owners(snapshots: Sequence[Snapshot]) -> list[int]:
    """Return the ids of the users who submitted these runs, and this user's in any case."""
    owners = {os.getuid()}
    for name in {item.manifest.submitter for item in snapshots} - {os.environ.get("LOGNAME"), os.environ.get("USER")}:
        with contextlib.suppress(KeyError):
            owners.add(pwd.getpwnam(name).pw_uid)
    return sorted(owners)


def _is_over(item: Snapshot) -> bool:
    """Return whether the run's own files settle its state: what failed may be started again by its scheduler."""
    if item.job is None or item.own_state is None:
        return False
    return item.own_state is JobState.COMPLETED or not CAPABILITIES[item.job.id.scheduler].requeues


def _record_of(item: Snapshot, answer: Answer) -> JobRecord | None:
    """Return the record of the run's job, but not that of another job to which the scheduler gave the same id."""
    record = answer.records.get(item.job.id) if item.job else None
    return record if record is not None and item.job is not None and _is_of(item, item.job.id.token, record) else None


def _is_of(item: Snapshot, token: str, record: JobRecord) -> bool:
    """Return whether a record is of this run's job: its token tells, or the name where no token is known."""
    if token and record.token:
        return record.token == token
    return record.name in ("", item.manifest.name, item.manifest.group)


def _judge(item: Snapshot, record: JobRecord | None, answer: Answer) -> tuple[JobState, str]:
    """Return state and reason of a run."""
    if item.job is None:
        return JobState.UNKNOWN, "no job is recorded"
    if _is_over(item):
        return _own_word(item)
    if record is not None:
        return _judge_record(item, record)
    if item.own_state is not None:
        return _own_word(item)
    if item.cancelled and answer.problem is None:
        return JobState.CANCELLED, item.failure()  # a job that does not end in time is killed with its batch script
    title = scheduler_of(item.job.id.scheduler).title
    forgotten = f"{title} no longer knows the job, which did not record how it ended"
    return JobState.UNKNOWN, answer.problem or answer.doubt or forgotten


def _judge_record(item: Snapshot, record: JobRecord) -> tuple[JobState, str]:
    if record.state is JobState.RUNNING:
        return record.state, _at_work(item)
    if record.state is JobState.FAILED:
        latest = item if item.own_state is not None else snapshot(item.paths)  # it may have ended since the first look
        if latest.own_state is not None:
            return _own_word(latest)
        if record.exit_code is not None:
            return record.state, f"ended with exit code {record.exit_code}"
    return record.state, record.reason


def _at_work(item: Snapshot) -> str:
    """Return what a run does now, and which restart in place within its job that is."""
    restarts = AttemptName(item.attempt or "").generation
    phase = f"{item.phase}, restart {restarts} in place" if restarts else item.phase
    return phase + _silence(item.paths) if item.phase == "training" else phase


def _silence(paths: RunPaths) -> str:
    """Return a word on ranks that show no sign of life: while they train, rank 0 renews the lease each minute."""
    try:
        silent = time.time() - paths.lease.stat().st_mtime
    except FileNotFoundError:
        return ""
    minutes = int(silent // 60)
    return f"; no sign of life for {minutes} min, its ranks may be stopped" if minutes >= _SILENT_MINUTES else ""


def _own_word(item: Snapshot) -> tuple[JobState, str]:
    assert item.own_state is not None
    return item.own_state, "" if item.own_state is JobState.COMPLETED else item.failure()


def _first_of_race(item: Snapshot, answer: Answer | None) -> Snapshot:
    """Return the run as that of the first of its race's jobs that may still start, if there is a race."""
    if not item.rivals or item.job is None or answer is None:
        return item
    turns = [dataclasses.replace(item, job=job) for job in (item.job, *item.rivals)]
    waiting = (turn for turn in turns if (record := _record_of(turn, answer)) is not None and record.state.active)
    return next(waiting, item)


def _row(item: Snapshot, answers: Mapping[SchedulerName, Answer]) -> RunStatus:
    answer = answers.get(item.job.id.scheduler) if item.job else None
    item = _first_of_race(item, answer)
    record = _record_of(item, answer) if answer is not None else None
    state, reason = _judge(item, record, answer or Answer(records={}))
    numbers = item.numbers
    checkpoints = item.paths.complete_checkpoints()
    resumed = checkpoint_step(checkpoints[-1]) if checkpoints and not numbers else None
    return RunStatus(
        run=item.paths.name,
        directory=str(item.paths.root),
        state=state,
        attempt=item.attempt,
        job=item.job.id.text if item.job else None,
        scheduler=item.job.id.scheduler if item.job else None,
        cluster=item.job.id.cluster if item.job else "",
        step=numbers.get("step", resumed),
        max_steps=item.progress.get("max_steps"),
        loss=numbers.get("loss"),
        tokens_per_second=numbers.get("tokens_per_second"),
        mfu=numbers.get("mfu"),
        first_step_seconds=numbers.get("first_step_seconds"),
        eta_seconds=numbers.get("eta_seconds") if state is JobState.RUNNING else None,
        checkpoint=checkpoints[-1].name if checkpoints else None,
        exit_code=item.exit_code,
        reason=f"first of {len(item.rivals) + 1} to start: {reason}" if item.rivals and reason else reason,
        expected_start=record.expected_start if record and state is JobState.PENDING else None,
    )
