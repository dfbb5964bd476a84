"""The runs of a sweep as a group.

A group is a file, RUN_ROOT/.groups/NAME.json, that lists its runs and what was set in each; each run is a directory
like any other, NAME-0, NAME-1, ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError, did_you_mean
from launcher.contract.records import read_metrics
from launcher.contract.rundir import RunPaths, group_file, read_json
from launcher.runs.find import find_run


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Runs that belong together."""

    name: str
    root: Path
    points: dict[str, dict[str, str]]
    """Run → what was set in it."""

    @property
    def runs(self) -> list[RunPaths]:
        """The group's runs, in order."""
        return [RunPaths(self.root / name) for name in self.points]

    @property
    def file(self) -> Path:
        """Where the group is written down."""
        return group_file(self.root, self.name)


def read_group(name: str, root: Path) -> Group | None:
    """Return the group of this name in `root`, if there is one, or raise RunStateError where its file is damaged."""
    try:
        values = read_json(group_file(root, name)) if "/" not in name else None
        points = None if values is None else {str(run): dict(given) for run, given in values["points"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunStateError(f"{group_file(root, name)} is no list of a sweep's runs: {error}") from None
    return None if points is None else Group(name=name, root=root.absolute(), points=points)


def find_runs(word: str, root: Path) -> list[RunPaths]:
    """Return the run that `word` names, or all submitted runs of the group that it names."""
    group = read_group(word, root)
    return [find_run(word, root)] if group is None else [run for run in group.runs if run.manifest.is_file()]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """A row of `launcher results`."""

    run: str
    """The run's name."""
    set: dict[str, str]
    """Key to what the sweep sets in the run."""
    metrics: dict[str, float]
    """Name to the last value that the run logged."""


def results(runs: Sequence[RunPaths], points: dict[str, dict[str, str]]) -> list[RunResult]:
    """Return a row for each run: its name, what was set in it, and the last value of every metric it has logged."""
    rows: list[RunResult] = []
    for paths in runs:
        last: dict[str, float] = {}
        for line in read_metrics(paths):
            last |= line
        rows.append(RunResult(run=paths.name, set=points.get(paths.name, {}), metrics=last))
    return rows


def sort_results(rows: list[RunResult], metric: str | None, descending: bool) -> list[RunResult]:
    """Return the rows sorted by a metric (default loss), those without it last.

    Raise ConfigError where it was asked for and no run has it.
    """
    known = sorted({name for row in rows for name in row.metrics})
    if metric is None:
        metric = "loss"
    elif metric not in known:
        have = ", ".join(known) or "none yet"
        raise ConfigError(f"--sort: no run has logged {metric!r}{did_you_mean(metric, known)}; there are: {have}")
    having = [row for row in rows if metric in row.metrics]
    having.sort(key=lambda row: row.metrics[metric], reverse=descending)
    return having + [row for row in rows if metric not in row.metrics]
