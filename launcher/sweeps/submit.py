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
from launcher.contract.spec import to_yaml
from launcher.scheduler.base import Dependency, Scheduler
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.plan import Plan, make_plan
from launcher.submission.submit import submit
from launcher.sweeps.groups import Group, read_group
from launcher.sweeps.job_array import check_alike, submit_arrays
from launcher.sweeps.sweep import Sweep


def plan_sweep(path: Path, sweep: Sweep, overrides: Sequence[str], cluster: str | None) -> tuple[Group, list[Plan]]:
    """Return every run of a sweep, checked. ConfigError with the problems of all points, each said once."""
    problems: dict[str, None] = {}
    plans: list[Plan] = []
    name = ""
    for number, point in enumerate(sweep.points):
        words = [*overrides, *(f"{key}={value}" for key, value in point)]
        try:
            if not name:
                name = make_plan(path, words, cluster).spec.name
            plans.append(make_plan(path, [*words, f"name={name}-{number}"], cluster))
        except ConfigError as error:
            problems |= dict.fromkeys(error.problems)
    if problems:
        raise ConfigError(list(problems))
    root = plans[0].paths.root.parent
    scheduler = plans[0].spec.cluster.scheduler
    able = CAPABILITIES[scheduler]
    for key, given, possible in (
        ("max_at_once", sweep.max_at_once is not None, able.dependencies),
        ("as: array", sweep.array, able.arrays),
    ):
        if given and not possible:
            raise ConfigError(f"sweep.{key}: scheduler {scheduler} cannot do that; drop it, or choose another cluster")
    points = {plan.paths.name: dict(point) for plan, point in zip(plans, sweep.points, strict=True)}
    return Group(name=name, root=root, points=points), plans


def submit_group(group: Group, plans: Sequence[Plan], sweep: Sweep, command: Sequence[str]) -> list[Job]:
    """Submit the runs without a job and return the jobs of all. Called again after an interruption it goes on."""
    _check_new(group, plans)
    _check_limits(scheduler_of(plans[0].spec.cluster.scheduler), len(plans))
    if sweep.array:
        check_alike(plans)
    write_json(group.file, {"points": group.points})
    if sweep.array:
        return submit_arrays(group, plans, sweep.max_at_once, command)
    max_at_once = sweep.max_at_once
    jobs: list[Job] = []
    for number, plan in enumerate(plans):
        waits_for = []
        if max_at_once is not None and number >= max_at_once:
            waits_for = [Dependency(job=jobs[number - max_at_once].id, when="ended")]
        try:
            known = _job(plan.paths)
            jobs.append(known or submit(plan, command, group=group.name, waits_for=waits_for))
        except LauncherError as error:
            raise type(error)(
                f"{error}\n{number} of the {len(plans)} runs of {group.name} are submitted; "
                "give the same command again for the others"
            ) from None
    return jobs


def _job(paths: RunPaths) -> Job | None:
    """Return the run's newest job, if its submission is complete."""
    if not paths.manifest.is_file() or intent.pending(paths) is not None:
        return None
    jobs = read_manifest(paths).jobs
    return jobs[-1] if jobs else None


def _check_new(group: Group, plans: Sequence[Plan]) -> None:
    """Raise RunStateError unless the names are free, or are those of this very group, not yet submitted as a whole."""
    before = read_group(group.name, group.root)
    taken = [plan for plan in plans if _job(plan.paths) is not None]
    if before is None and taken:
        raise RunStateError(f"run {taken[0].paths.name} exists in {group.root}; choose another name (name=...)")
    changed = [plan.paths.name for plan in taken if plan.paths.config.read_text(encoding="utf-8") != to_yaml(plan.spec)]
    if before is not None and (before.points != group.points or changed or len(taken) == len(plans)):
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
