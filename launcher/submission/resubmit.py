"""Go on with a run, in its directory or with other settings as a child run that starts from its checkpoint.

Two jobs must never write one run's checkpoints, so both ask the scheduler first and refuse where it cannot tell. A lock
keeps two of these commands from asking at the same moment.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import HubError, RunStateError, SchedulerError
from launcher.contract.hub.found import fetch_now
from launcher.contract.hub.resolve import resolve_hub
from launcher.contract.hub_cache import cache_root
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.lease import Owner, check_free, holder
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RunSpec, read_resolved
from launcher.runs.state import RunStatus, collect
from launcher.scheduler.factory import scheduler_of
from launcher.submission.claim import claim
from launcher.submission.early_resume import check_goes_on
from launcher.submission.names import free_name
from launcher.submission.submission import Submission, make_submission
from launcher.submission.submit import start


def check_idle(paths: RunPaths) -> RunStatus:
    """Return the run's state. RunStateError or SchedulerError where a job of it may still be at work."""
    rows, problem = collect([paths], fresh=True)
    status = rows[0]
    if status.state.active:
        raise RunStateError(
            f"run {paths.name} is {status.state.value} as job {status.job_id}; "
            f"wait for it, or end it with `launcher cancel {paths.name}`"
        )
    if status.state is JobState.UNKNOWN and problem is not None:
        raise SchedulerError(f"cannot tell whether a job of {paths.name} is still at work: {problem}")
    if status.may_run_unseen:
        raise RunStateError(f"cannot tell whether {paths.name} is still at work: {status.reason}")
    _check_lease(paths, status)
    return status


def _check_lease(paths: RunPaths, status: RunStatus) -> None:
    """Raise RunStateError where something other than the run's own job holds it: a job or ranks started by hand."""
    owner = holder(paths)
    if owner is None or (owner.job_id and owner.is_of_job(status.job or "", status.cluster)):
        return
    check_free(paths, _state_of(owner, status) if owner.job_id else JobState.UNKNOWN)


def _state_of(owner: Owner, status: RunStatus) -> JobState:
    """Return the state of a job that holds the run of `status`. All jobs of a run have the same scheduler."""
    if status.scheduler is None:
        return JobState.UNKNOWN
    job = Job(id=JobId(owner.job_id, status.scheduler, cluster=owner.cluster), submitted_at=0.0)
    record = scheduler_of(status.scheduler).states([job], [os.getuid()], fresh=True).records.get(job.id)
    return record.state if record is not None else JobState.UNKNOWN


def same_run(paths: RunPaths) -> Job:
    """Submit the same run again and return the job. Training goes on from the newest complete checkpoint."""
    with claim(paths.root):
        status = check_idle(paths)
        if status.state is JobState.COMPLETED:
            raise RunStateError(
                f"run {paths.name} has finished; to train on, raise its steps: "
                f"`launcher resubmit {paths.name} train.max_steps=...`"
            )
        spec = read_resolved(paths.config)
        _check_place(paths, spec)
        fetch_again(spec)
        check_goes_on(spec, paths)
        job = start(paths, spec)
        if status.job_id is not None and status.job_id.text != job.id.text:
            _go_on_as(status.job_id, job.id)
        return job


def _check_place(paths: RunPaths, spec: RunSpec) -> None:
    """Raise RunStateError where the run was moved or copied: its script and config name the place it had."""
    if _is_in_place(paths, spec):
        return
    place = Path(spec.run_root) / spec.name
    raise RunStateError(
        f"{paths.root} was {place} when it was submitted, and its script still writes there; move it back, or go on "
        f"from its checkpoint as a run of its own: `launcher resubmit {paths.root} name={free_name(paths)}`"
    )


def _is_in_place(paths: RunPaths, spec: RunSpec) -> bool:
    place = Path(spec.run_root) / spec.name
    return place.exists() and place.samefile(paths.root)


def _go_on_as(old: JobId, new: JobId) -> None:
    """Have jobs that wait for the run's old job wait for the new one, or say that they do not."""
    try:
        scheduler_of(new.scheduler).go_on_as(old, new)
    except SchedulerError as error:
        print(f"jobs that wait for job {old} were not told that job {new} goes on: {error}", file=sys.stderr)


def fetch_again(spec: RunSpec) -> None:
    """Fetch what was removed from the hub's cache since. HubError where that has another place now, or fails."""
    found = resolve_hub(spec)
    if found.problems:
        raise HubError([f"{key}: {problem}" for key, problem in found.problems])
    if found.spec != spec:
        raise HubError(
            f"what the run has of the hub is gone from the cache that it used, and the cache is {cache_root()} now; "
            "set HF_HUB_CACHE to the one it was"
        )
    fetch_now(found.fetches)


def child_submission(paths: RunPaths, overrides: Sequence[str], cluster: str | None) -> Submission:
    """Return the submission of a child run with `overrides`, resuming from the parent's newest complete checkpoint."""
    status = check_idle(paths)
    before = read_resolved(paths.config)  # raises where the file is damaged
    words = {word.partition("=")[0] for word in overrides}
    added = [] if "name" in words else [f"name={free_name(paths)}"]
    checkpoints = paths.complete_checkpoints()
    if not words & {"run_root"} and not _is_in_place(paths, before):
        added.append(f"run_root={paths.root.parent}")
    if checkpoints and "checkpoint.resume_from" not in words:
        added.append(f"checkpoint.resume_from={checkpoints[-1]}")
    given = read_manifest(paths).given_resources
    submission = make_submission(paths.config, [*added, *overrides], cluster, resolved=True, given=given)
    _check_start(before, submission.spec)
    if status.state is JobState.COMPLETED and not _trains_on(before, submission.spec):
        raise RunStateError(
            f"run {paths.name} has finished, and these settings do not train longer; "
            "raise train.max_steps or train.epochs"
        )
    return submission


def _check_start(parent: RunSpec, child: RunSpec) -> None:
    """Raise RunStateError for another model to start from: a run that goes on has the weights of its checkpoint.

    With adapters the model's own weights are read, and the ranks compare them with those that the adapters are of.
    """
    if child.checkpoint.resume_from is None or child.model.lora.rank is not None:
        return
    was, now = Path(parent.model.path), Path(child.model.path)
    moved = not was.exists()
    same = moved or not now.exists() or now.samefile(was)
    given = [] if same else [f"model.path {child.model.path}"]
    given += [] if child.model.init == parent.model.init else [f"model.init {child.model.init}"]
    if given:
        raise RunStateError(
            f"{' and '.join(given)}: the weights would be those of {child.checkpoint.resume_from} all the same; drop "
            "that, or add checkpoint.resume_from=null to start anew from the model"
        )


def _trains_on(parent: RunSpec, child: RunSpec) -> bool:
    before, after = parent.train, child.train
    if before.early_stopping.patience is not None and before.early_stopping != after.early_stopping:
        return True  # it may have ended early; the ranks know
    if before.max_steps is not None and after.max_steps is not None:
        return after.max_steps > before.max_steps
    if before.epochs is not None and after.epochs is not None:
        return after.epochs > before.epochs
    return True  # steps became epochs or the other way round: only the ranks know how long that is


def failed_of(runs: Sequence[RunPaths]) -> list[RunPaths]:
    """Return those of the runs that have ended without success and were not cancelled."""
    rows, problem = collect(runs, fresh=True)
    if problem is not None:
        raise SchedulerError(problem)
    good = (JobState.COMPLETED, JobState.CANCELLED)
    return [paths for paths, row in zip(runs, rows, strict=True) if row.state.terminal and row.state not in good]
