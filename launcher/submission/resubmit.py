"""Go on with a run: in the same directory, or with other settings as a child run that starts from its checkpoint.

Two jobs must never write one run's checkpoints, so both ask the scheduler first and refuse where it cannot tell; a
lock keeps two of these commands from asking at the same moment.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.lease import check_free, holder
from launcher.contract.manifest import Attempt
from launcher.contract.rundir import RunPaths, append_event
from launcher.contract.spec import RunSpec, read_resolved
from launcher.runs.find import snapshot
from launcher.runs.state import RunStatus, collect
from launcher.scheduler import local, slurm
from launcher.scheduler import queries as scheduler
from launcher.submission.claim import claim
from launcher.submission.code_snapshot import digest
from launcher.submission.intent import free_name
from launcher.submission.lockfile import read_lockfile
from launcher.submission.plan import Plan, make_plan
from launcher.submission.secret_files import remove_secrets
from launcher.submission.submit import start


def check_idle(paths: RunPaths) -> RunStatus:
    """The run's state, if no job of it can still be at work."""
    rows, problem = collect([paths], fresh=True)
    status = rows[0]
    if status.state.active:
        raise RunStateError(
            f"run {paths.name} is {status.state.value} as job {status.job}; "
            f"wait for it, or end it with `launcher cancel {paths.name}`"
        )
    if status.state is JobState.UNKNOWN and problem is not None:
        raise SchedulerError(f"cannot tell whether a job of {paths.name} is still at work: {problem}")
    if status.state is JobState.UNKNOWN and status.scheduler == "local":
        raise RunStateError(f"cannot tell whether {paths.name} is still at work: {status.reason}")
    _check_lease(paths, status)
    return status


def _check_lease(paths: RunPaths, status: RunStatus) -> None:
    """The run's own job is over; what else may hold it was started by hand: another job, or ranks without one."""
    owner = holder(paths)
    if owner is None or (owner.job_id and owner.job_id == status.job):
        return
    asked = {owner.job_id: 0.0} if owner.job_id and status.scheduler == "slurm" else {}
    record = scheduler.ask(asked, [os.getuid()], fresh=True).records.get(owner.job_id)
    check_free(paths, record.state.value if record is not None else "")


def same_run(paths: RunPaths) -> Attempt:
    """A new attempt of the same run; training goes on from its newest complete checkpoint."""
    with claim(paths.root):
        if check_idle(paths).state is JobState.COMPLETED:
            raise RunStateError(
                f"run {paths.name} has finished; to train on, raise its steps: "
                f"`launcher resubmit {paths.name} train.max_steps=...`"
            )
        _check_code(paths)
        return start(paths, read_resolved(paths.config))


def _check_code(paths: RunPaths) -> None:
    """The run's copy of its code is what was submitted first."""
    then = read_lockfile(paths.lock).get("code") if paths.lock.is_file() else None
    if then is not None and digest(paths.code) != then["sha256"]:
        raise RunStateError(
            f"{paths.code} was changed since run {paths.name} was submitted; restore it, "
            f"or start a new run with the code that is here: `launcher submit {paths.lock}`"
        )


def child_plan(paths: RunPaths, overrides: Sequence[str], cluster: str | None) -> Plan:
    """The plan of a child run with `overrides`, resuming from the parent's newest complete checkpoint."""
    status = check_idle(paths)
    words = {word.partition("=")[0] for word in overrides}
    added = [] if "name" in words else [f"name={free_name(paths)}"]
    checkpoints = paths.complete_checkpoints()
    if checkpoints and "checkpoint.resume_from" not in words:
        added.append(f"checkpoint.resume_from={checkpoints[-1]}")
    plan = make_plan(paths.config, [*added, *overrides], cluster, resolved=True)
    if status.state is JobState.COMPLETED and not _trains_on(read_resolved(paths.config), plan.spec):
        raise RunStateError(
            f"run {paths.name} has finished, and these settings do not train longer; "
            "raise train.max_steps or train.epochs"
        )
    return plan


def _trains_on(parent: RunSpec, child: RunSpec) -> bool:
    before, after = parent.train, child.train
    if before.max_steps is not None and after.max_steps is not None:
        return after.max_steps > before.max_steps
    if before.epochs is not None and after.epochs is not None:
        return after.epochs > before.epochs
    return True  # steps became epochs or the other way round: only the ranks know how long that is


def failed_of(runs: Sequence[RunPaths]) -> list[RunPaths]:
    """Those of the runs that have ended without success, and were not cancelled."""
    rows, problem = collect(runs, fresh=True)
    if problem is not None:
        raise SchedulerError(problem)
    good = (JobState.COMPLETED, JobState.CANCELLED)
    return [paths for paths, row in zip(runs, rows, strict=True) if row.state.terminal and row.state not in good]


def active_of(runs: Sequence[RunPaths]) -> list[RunPaths]:
    """Those of the runs that have not ended, as far as is known."""
    rows, _ = collect(runs, fresh=True)
    return [paths for paths, row in zip(runs, rows, strict=True) if not row.state.terminal]


def cancel(runs: Sequence[RunPaths]) -> list[str]:
    """End the jobs of these runs; what was done, one line each."""
    rows, problem = collect(runs, fresh=True)
    idle = [f"run {row.run} is {row.state.value}: nothing to cancel" for row in rows if row.state.terminal]
    if idle:
        raise RunStateError("\n".join(idle))
    if problem is not None:
        raise SchedulerError(problem)
    done = []
    for paths, row in zip(runs, rows, strict=True):
        job = snapshot(paths).job
        if job is None:
            raise RunStateError(f"run {paths.name} has no job")
        if job.scheduler == "local" and not local.is_here(job):
            raise RunStateError(f"run {paths.name} is process {job.job_id} on {job.host}; cancel it there")
        append_event(paths, "cancelled", job_id=job.job_id)
        if job.scheduler == "slurm":
            slurm.cancel([job.job_id])
            scheduler.forget()
        else:
            local.end(job)
        done.append(f"cancelled run {row.run} (job {job.job_id})")
        if job.scheduler == "slurm":
            try:
                remove_secrets(read_resolved(paths.config), paths)
            except (ConfigError, OSError) as error:  # which must not keep the other runs alive
                done.append(f"left a file of secrets behind, if run {row.run} had one: {error}")
    return done
