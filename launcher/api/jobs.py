"""submit, resubmit, cancel: what makes jobs of runs, and ends them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, overload

from launcher.api.checked import CheckedRun, CheckedSweep, validate
from launcher.api.runs import Run, found
from launcher.contract.job import JobId
from launcher.contract.rundir import default_run_root
from launcher.contract.schedulers import SchedulerName
from launcher.runs.find import find_run

if TYPE_CHECKING:
    from launcher.contract.job import Job
    from launcher.contract.rundir import RunPaths
    from launcher.submission.submission import Submission


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedRun:
    """A run and the job that it has now."""

    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    job: str
    """The job's id, as the scheduler writes it."""
    scheduler: SchedulerName
    """Whose id it is."""
    cluster: str = ""
    """The cluster that the job was sent to, where Slurm has several; empty for the one at hand."""
    candidates: dict[str, str] = field(default_factory=dict)
    """With --first-of, cluster or partition to the id of its job: the first to start has the run. Else empty."""

    @property
    def job_id(self) -> JobId:
        """The job's identity."""
        return JobId(self.job, self.scheduler, cluster=self.cluster)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedSweep:
    """The runs of a sweep and their jobs."""

    group: str
    """The sweep's name."""
    runs: dict[str, str]
    """Run to the id of its job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Resubmitted:
    """The runs of a sweep that had failed, with the jobs by which they go on."""

    runs: dict[str, str]
    """Run to the id of its new job."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cancelled:
    """What `cancel` was asked to end."""

    cancelled: tuple[str, ...]
    """The names that were given: of runs, or of sweeps."""
    lines: tuple[str, ...]
    """What was done with each run."""


@overload
def submit(config: CheckedRun, *, accept_cost: bool = False, command: Sequence[str] = ()) -> SubmittedRun: ...
@overload
def submit(config: CheckedSweep, *, accept_cost: bool = False, command: Sequence[str] = ()) -> SubmittedSweep: ...
@overload
def submit(
    config: Path | str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    accept_cost: bool = False,
    command: Sequence[str] = (),
) -> SubmittedRun | SubmittedSweep: ...
def submit(
    config: CheckedRun | CheckedSweep | Path | str,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    accept_cost: bool = False,
    command: Sequence[str] = (),
) -> SubmittedRun | SubmittedSweep:
    """Submit a config, or what `validate` made of one, as exactly one job for each run.

    Called again after it was interrupted, it finishes the same submission. Raise ConfigError where the run takes more
    than resources.gpu_hour_limit, unless `accept_cost`. `command` is what the manifest says the run was made by.
    """
    checked = config if isinstance(config, CheckedRun | CheckedSweep) else validate(config, overrides, cluster=cluster)
    excess = None if accept_cost else cost_above_limit(checked.submissions)
    if excess is not None:
        from launcher.contract.errors import ConfigError

        raise ConfigError(f"{excess}; submit with --yes if that is meant")
    words = list(command) or ["launcher.api.submit", checked.submissions[0].spec.name, *overrides]
    if isinstance(checked, CheckedSweep):
        from launcher.sweeps.submit import submit_group

        jobs = submit_group(checked.group, checked.submissions, checked.sweep, words)
        texts = [job.id.text for job in jobs]
        return SubmittedSweep(group=checked.group.name, runs=dict(zip(checked.group.points, texts, strict=True)))
    return submit_run(checked, words)


def submit_run(checked: CheckedRun, command: Sequence[str]) -> SubmittedRun:
    """Submit a run whatever it costs. `command` is what the manifest says it was made by."""
    from launcher.submission.first_of import submit_first_of
    from launcher.submission.submit import submit as submit_new

    if checked.race:
        jobs = submit_first_of(checked.race, command, checked.parent_run)
        first = _submitted(checked.submission.paths, next(iter(jobs.values())))
        return dataclasses.replace(first, candidates={name: job.id.text for name, job in jobs.items()})
    return _submitted(checked.submission.paths, submit_new(checked.submission, command, checked.parent_run))


def cost_above_limit(submissions: Sequence[Submission]) -> str | None:
    """Return what runs cost together where that is, or may be, above resources.gpu_hour_limit, else None."""
    from launcher.planning.run_plan import run_cost

    limit = submissions[0].spec.resources.gpu_hour_limit
    if limit is None:
        return None
    with_gpus = [submission for submission in submissions if submission.spec.resources.gpus_per_node]
    found = [run_cost(submission.spec, submission.prediction) for submission in with_gpus]
    if None in found:
        why = "neither train.max_steps with a known GPU nor resources.time tells it"
        return f"how many GPU hours the run takes is not known ({why}); resources.gpu_hour_limit is {limit:,.1f}"
    costs = [cost for cost in found if cost is not None]
    hours = sum(cost.gpu_hours for cost in costs)
    if hours <= limit:
        return None
    what = f"{len(submissions)} runs take up to {hours:,.1f} GPU hours"
    if len(submissions) == 1:
        what = f"the run takes up to {costs[0].describe()}"
    return f"{what}; resources.gpu_hour_limit is {limit:,.1f}"


def resubmit(
    run: Run,
    overrides: Sequence[str] = (),
    *,
    root: Path | None = None,
    cluster: str | None = None,
    command: Sequence[str] = (),
) -> SubmittedRun:
    """Go on with a run from its newest complete checkpoint: in its directory, or with other settings as a child run.

    Raise RunStateError where a job of it may still be at work, or it has finished and would not train longer.
    """
    from launcher.submission.resubmit import same_run

    if overrides or cluster:
        child = check_child(run, overrides, root=root, cluster=cluster)
        return submit_run(child, command or ["launcher.api.resubmit", str(run), *overrides])
    paths = find_run(str(run), root or default_run_root())
    return _submitted(paths, same_run(paths))


def check_child(
    run: Run, overrides: Sequence[str], *, root: Path | None = None, cluster: str | None = None
) -> CheckedRun:
    """Check a child run, with other settings or on another cluster, that starts from a run's newest checkpoint.

    Submit it with `submit` or `submit_run`.
    """
    from launcher.submission.resubmit import child_submission

    paths = find_run(str(run), root or default_run_root())
    return CheckedRun(submission=child_submission(paths, overrides, cluster), parent_run=str(paths.root))


def resubmit_failed(group: str, *, root: Path | None = None) -> Resubmitted:
    """Go on with every run of a sweep that has failed, as it is."""
    from launcher.submission.resubmit import failed_of, same_run

    return Resubmitted(runs={paths.name: same_run(paths).id.text for paths in failed_of(found([group], root))})


def cancel(runs: Sequence[Run], *, root: Path | None = None) -> Cancelled:
    """Have runs stop at a step boundary with a checkpoint, and end their jobs. Of a sweep, those that have not ended.

    Raise RunStateError where a run has no job or its job has ended, SchedulerError where no scheduler answers.
    """
    from launcher.submission.cancel import active_of
    from launcher.submission.cancel import cancel as end

    chosen = found(runs, root)
    of_groups = len(chosen) > len(runs)  # of a group's runs some may have ended: the others are meant
    lines = end(active_of(chosen) or chosen if of_groups else chosen)
    return Cancelled(cancelled=tuple(map(str, runs)), lines=tuple(lines))


def _submitted(paths: RunPaths, job: Job) -> SubmittedRun:
    return SubmittedRun(
        run=paths.name,
        directory=str(paths.root),
        job=job.id.text,
        scheduler=job.id.scheduler,
        cluster=job.id.cluster,
    )
