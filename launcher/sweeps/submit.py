"""From a sweep to the jobs of its runs.

All points are checked before the first is submitted, and the group's file is written before that too: a submission that
was interrupted goes on where it stopped when the same command is given again.

A limit on runs at work together is a dependency of each run on the one that many places before it, which holds without
anything that has to stay alive.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError, LauncherError, RunStateError, SchedulerError
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths, write_json
from launcher.contract.spec import to_yaml
from launcher.scheduler import slurm
from launcher.submission.intent import pending
from launcher.submission.plan import Plan, make_plan
from launcher.submission.submit import submit
from launcher.sweeps.groups import Group, read_group
from launcher.sweeps.job_array import check_alike, submit_arrays
from launcher.sweeps.sweep import Sweep


def plan_sweep(path: Path, sweep: Sweep, overrides: Sequence[str], cluster: str | None) -> tuple[Group, list[Plan]]:
    """Every run of a sweep, checked; ConfigError with the problems of all points, each said once."""
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
    for key, given in (("max_at_once", sweep.max_at_once is not None), ("as: array", sweep.array)):
        if given and plans[0].spec.cluster.scheduler != "slurm":
            raise ConfigError(f"sweep.{key}: only Slurm can do that; drop it, or submit to a cluster with Slurm")
    points = {plan.paths.name: dict(point) for plan, point in zip(plans, sweep.points, strict=True)}
    return Group(name=name, root=root, points=points), plans


def submit_group(group: Group, plans: Sequence[Plan], sweep: Sweep, command: Sequence[str]) -> list[str]:
    """Submit every run that has no job yet; the job ids of all. Called again after an interruption it goes on."""
    _check_new(group, plans)
    if plans[0].spec.cluster.scheduler == "slurm":
        _check_limits(len(plans))
    if sweep.array:
        check_alike(plans)
    write_json(group.file, {"points": group.points})
    if sweep.array:
        return submit_arrays(group, plans, sweep.max_at_once, command)
    max_at_once = sweep.max_at_once
    jobs: list[str] = []
    for number, plan in enumerate(plans):
        waits_for = []
        if max_at_once is not None and number >= max_at_once:
            waits_for = [f"afterany:{jobs[number - max_at_once]}"]
        try:
            known = _job(plan.paths)
            jobs.append(known or submit(plan, command, group=group.name, waits_for=waits_for).job_id)
        except LauncherError as error:
            raise type(error)(
                f"{error}\n{number} of the {len(plans)} runs of {group.name} are submitted; "
                "give the same command again for the others"
            ) from None
    return jobs


def _job(paths: RunPaths) -> str | None:
    """The run's newest job, if its submission is complete."""
    if not paths.manifest.is_file() or pending(paths) is not None:
        return None
    attempts = read_manifest(paths).attempts
    return attempts[-1].job_id if attempts else None


def _check_new(group: Group, plans: Sequence[Plan]) -> None:
    """The group's names are free, or they are those of this very group, not all of it submitted."""
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


def _check_limits(count: int) -> None:
    """Refuse before the first job what Slurm would refuse at some later one."""
    for name, limit in slurm.job_limits().items():
        if count > limit:
            raise SchedulerError(
                f"the sweep has {count} runs, and Slurm's {name} is {limit}; split it (name=... and fewer values)"
            )
