"""Compares the batch script of a config with that of a run, or with the one for another cluster."""

from __future__ import annotations

import dataclasses
import difflib

from launcher.contract.rundir import RunPaths
from launcher.submission.plan import Plan
from launcher.submission.script import script_of


def against_run(plan: Plan, run: RunPaths) -> str:
    """Return the unified diff from the script of `run` to the one that this config would give it."""
    ours = script_of(dataclasses.replace(plan, paths=run))
    return _diff(run.script.read_text(encoding="utf-8"), ours, str(run.script), str(plan.config.path))


def against_cluster(plan: Plan, other: Plan) -> str:
    """Return the unified diff from the script for the config's cluster to the one for another cluster."""
    names = (f"{plan.config.path} on {at.spec.cluster.name}" for at in (plan, other))
    return _diff(script_of(plan), script_of(other), *names)


def _diff(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), old_name, new_name)
    return "".join(lines)
