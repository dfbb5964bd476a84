"""From a sweep to the jobs of its runs.

All points are checked and the group's file is written before the first run is submitted: a submission that was
interrupted goes on where it stopped when the same command is given again.

A limit on concurrent runs is a dependency of each run on the one that many places before it, so that no process has to
stay alive to enforce it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError, LauncherError, RunStateError, SchedulerError
from launcher.contract.job import Job
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths, write_json
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import is_config_of
from launcher.scheduler.base import Dependency, Scheduler
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.submission import Submission, make_submission
from launcher.submission.submit import submit
from launcher.sweeps.groups import Group, read_group
from launcher.sweeps.job_array import check_alike, submit_arrays
from launcher.sweeps.sweep import Sweep


def _check_overrides(sweep: Sweep, overrides: Sequence[str]) -> None:
    """Raise ConfigError for overrides of what the sweep sets in its runs, whose values would win."""
    swept = {key for point in sweep.points for key, _ in point}
    lost = [word for word in overrides if word.partition("=")[0] in swept]
    if lost:
        raise ConfigError(
            [
                f"override {word!r}: the sweep sets {word.partition('=')[0]} in its runs; leave out one of the two"
                for word in lost
            ]
        )


def sweep_submissions(
    path: Path, sweep: Sweep, overrides: Sequence[str], cluster: str | None
) -> tuple[Group, list[Submission]]:
    """Return every run of a sweep, checked. ConfigError with the problems of all points, each said once."""
    _check_overrides(sweep, overrides)
    problems: dict[str, None] = {}
    submissions: list[Submission] = []
    name = ""
    for number, point in enumerate(sweep.points):
        words = [*overrides, *(f"{key}={value}" for key, value in point)]
        try:
            if not name:
                name = make_submission(path, words, cluster).spec.name
            submissions.append(make_submission(path, [*words, f"name={name}-{number}"], cluster))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))
    root = submissions[0].paths.root.parent
    scheduler = submissions[0].spec.cluster.scheduler
    able = CAPABILITIES[scheduler]
    for key, given, possible in (
        ("max_at_once", sweep.max_at_once is not None, able.dependencies),
        ("as: array", sweep.array, able.arrays),
    ):
        if given and not possible:
            raise ConfigError(f"sweep.{key}: scheduler {scheduler} cannot do that; drop it, or choose another cluster")
    points = {submission.paths.name: dict(point) for submission, point in zip(submissions, sweep.points, strict=True)}
    return Group(name=name, root=root, points=points), submissions


def submit_group(group: Group, submissions: Sequence[Submission], sweep: Sweep, command: Sequence[str]) -> list[Job]:
    """Submit the runs without a job and return the jobs of all. Called again after an interruption it goes on."""
    _check_new(group, submissions)
    _check_limits(scheduler_of(submissions[0].spec.cluster.scheduler), len(submissions))
    if sweep.array:
        check_alike(submissions)
    write_json(group.file, {"points": group.points})
    if sweep.array:
        return submit_arrays(group, submissions, sweep.max_at_once, command)
    max_at_once = sweep.max_at_once
    jobs: list[Job] = []
    for number, submission in enumerate(submissions):
        waits_for = []
        if max_at_once is not None and number >= max_at_once:
            waits_for = [Dependency(job=jobs[number - max_at_once].id, when="ended")]
        try:
            known = _job(submission.paths)
            jobs.append(known or submit(submission, command, group=group.name, waits_for=waits_for))
        except LauncherError as error:
            raise type(error)(
                f"{error}\n{number} of the {len(submissions)} runs of {group.name} are submitted; "
                "give the same command again for the others"
            ) from None
    return jobs


def _job(paths: RunPaths) -> Job | None:
    """Return the run's newest job, if its submission is complete."""
    if not paths.manifest.is_file() or intent.pending(paths) is not None:
        return None
    jobs = read_manifest(paths).jobs
    return jobs[-1] if jobs else None


def _check_new(group: Group, submissions: Sequence[Submission]) -> None:
    """Raise RunStateError unless the names are free, or are those of this very group, not yet submitted as a whole."""
    before = read_group(group.name, group.root)
    taken = [submission for submission in submissions if _job(submission.paths) is not None]
    if before is None and taken:
        raise RunStateError(f"run {taken[0].paths.name} exists in {group.root}; choose another name (name=...)")
    changed = [
        submission.paths.name for submission in taken if not is_config_of(submission.paths.config, submission.spec)
    ]
    if before is not None and (before.points != group.points or changed or len(taken) == len(submissions)):
        raise RunStateError(
            f"group {group.name} exists in {group.root} with {len(before.points)} runs, {len(taken)} of them submitted;"
            f" see `launcher status {group.name}`, or choose another name (name=...)"
        )


def _check_limits(scheduler: Scheduler, count: int) -> None:
    """Raise SchedulerError before the first job where the scheduler would refuse a later one."""
    for name, limit in scheduler.job_limits().items():
        if count > limit:
            raise SchedulerError(
                f"the sweep has {count} runs, and {scheduler.title}'s {name} is {limit}; "
                "split it (name=... and fewer values)"
            )
