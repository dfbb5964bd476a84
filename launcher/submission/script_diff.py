"""Compares the batch script of a config with that of a run, or with the one for another cluster."""

from __future__ import annotations

import dataclasses
import difflib

from launcher.contract.rundir import RunPaths
from launcher.submission.script import script_of
from launcher.submission.submission import Submission


def against_run(submission: Submission, run: RunPaths) -> str:
    """Return the unified diff from the script of `run` to the one that this config would give it."""
    ours = script_of(dataclasses.replace(submission, paths=run))
    return _diff(run.script.read_text(encoding="utf-8"), ours, str(run.script), str(submission.config.path))


def against_cluster(submission: Submission, other: Submission) -> str:
    """Return the unified diff from the script for the config's cluster to the one for another cluster."""
    names = (f"{submission.config.path} on {at.spec.cluster.name}" for at in (submission, other))
    return _diff(script_of(submission), script_of(other), *names)


def _diff(old: str, new: str, old_name: str, new_name: str) -> str:
    lines = difflib.unified_diff(old.splitlines(True), new.splitlines(True), old_name, new_name)
    return "".join(lines)
