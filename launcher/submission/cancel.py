"""End the jobs of runs."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.job import job_fields
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths, append_event
from launcher.contract.spec import read_resolved
from launcher.runs.snapshot import snapshot
from launcher.runs.state import collect
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.claim import claim
from launcher.submission.secret_files import remove_secrets
from launcher.submission.submit import record


def active_of(runs: Sequence[RunPaths]) -> list[RunPaths]:
    """Return those of the runs that have not ended, as far as is known."""
    rows, _ = collect(runs, fresh=True)
    return [paths for paths, row in zip(runs, rows, strict=True) if not row.state.terminal]


def cancel(runs: Sequence[RunPaths]) -> list[str]:
    """End the jobs of these runs and return what was done, one line each.

    RunStateError where one of them has no job or its job has ended, SchedulerError where a scheduler does not answer.
    """
    for paths in runs:
        _settle(paths)
    rows, problem = collect(runs, fresh=True)
    idle = [f"run {row.run} is {row.state.value}: nothing to cancel" for row in rows if row.state.terminal]
    if idle:
        raise RunStateError("\n".join(idle))
    if problem is not None:
        raise SchedulerError(problem)
    done = []
    for paths, row in zip(runs, rows, strict=True):
        item = snapshot(paths)
        job = item.job
        if job is None:
            raise RunStateError(f"run {paths.name} has no job")
        if row.may_run_unseen:
            raise RunStateError(f"run {paths.name} cannot be cancelled from here: {row.reason}")
        if row.state is JobState.UNKNOWN:
            raise RunStateError(f"run {paths.name} was not cancelled: job {job.id}: {row.reason}")
        jobs = [job, *item.rivals]
        for each in jobs:
            append_event(paths, "cancelled", **job_fields(each.id))  # before the job ends, which looks for it
            scheduler_of(each.id.scheduler).cancel(each)
        plural = "s" if item.rivals else ""
        done.append(f"cancelled run {row.run} (job{plural} {', '.join(str(each.id) for each in jobs)})")
        try:
            remove_secrets(read_resolved(paths.config), paths)
        except (ConfigError, OSError) as error:  # which must not keep the other runs alive
            done.append(f"left a file of secrets behind, if run {row.run} had one: {error}")
    return done


def _settle(paths: RunPaths) -> None:
    """Record the job of a submission that a launcher began and was killed before it could record it."""
    # Without its record the job has no process that could be told from another one, and could not be ended.
    if not paths.manifest.is_file() or intent.pending(paths) is None:
        return
    with claim(paths.root):
        begun, manifest = intent.pending(paths), read_manifest(paths)
        if begun is None:
            return
        job = intent.find_job(paths, manifest.name, manifest.jobs, begun)
        if job is not None:
            record(paths, job, begun.candidate)
        intent.end(paths)
