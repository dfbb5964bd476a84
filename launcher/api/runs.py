"""status, list, wait, why, logs, report, results: what is known of runs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import LauncherError
from launcher.contract.rank_error import RankError
from launcher.contract.rundir import JsonObject, default_run_root
from launcher.runs.find import find_run
from launcher.runs.state import RunStatus
from launcher.views.log_files import Choice
from launcher.views.logs import Logs, choose

if TYPE_CHECKING:
    from launcher.attempts.remedies import Remedy
    from launcher.contract.rundir import RunPaths
    from launcher.runs.listing import ListedRun
    from launcher.runs.selection import Selection
    from launcher.sweeps.groups import RunResult

Run = str | Path
"""A run's name, or its directory. Where several are taken, a sweep's name stands for all of its runs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """The states of runs, in the order asked for."""

    rows: tuple[RunStatus, ...]
    problem: str | None = None
    """Why a scheduler could not be asked."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Why:
    """How the attempts of a run ended, and what was decided."""

    run: str
    """The run's name."""
    decisions: list[JsonObject]
    """The run's `restart_decided` events, oldest first."""
    history: str
    """The events that matter in words, one line each with its local time."""
    error: RankError | None
    """The error that the first failing rank of the newest attempt recorded, in full."""
    remedies: tuple[Remedy, ...]
    """What to set before the next try, by the newest decision's cause; empty where nothing is known to help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """A run as one HTML page."""

    run: str
    """The run's name."""
    file: str
    """Where the page is."""


def found(runs: Sequence[Run], root: Path | None) -> list[RunPaths]:
    """Return the directories of runs, groups in full. Raise RunStateError for a name that is none."""
    from launcher.sweeps.groups import find_runs

    return [paths for run in runs for paths in find_runs(str(run), root or default_run_root())]


def status(runs: Sequence[Run] = (), *, root: Path | None = None, select: Selection | None = None) -> States:
    """Return state and progress of runs, or of all runs in `root`. Each scheduler is asked once."""
    from launcher.runs.state import collect

    rows, problem = collect(selected(runs, root, select))
    fitting = tuple(row for row in rows if select is None or select.fits(row.state))
    return States(rows=fitting, problem=problem)


def list_runs(*, root: Path | None = None, select: Selection | None = None) -> tuple[ListedRun, ...]:
    """Return the runs in `root` by their files alone. No scheduler is asked."""
    from launcher.runs.listing import listing

    rows = listing(selected((), root, select))
    if select is None or not select.states:
        return tuple(rows)
    names = {state.value for state in select.states}  # rows have no state until the run is known to have ended
    return tuple(row for row in rows if row.state in names)


def wait(
    runs: Sequence[Run], *, root: Path | None = None, timeout: float | None = None
) -> tuple[RunStatus, ...] | None:
    """Return the states of runs once each has ended for good, or None if `timeout` seconds were not enough."""
    from launcher.runs.wait import wait as wait_for

    rows = wait_for(found(runs, root), timeout)
    return None if rows is None else tuple(rows)


def why(runs: Sequence[Run] = (), *, root: Path | None = None, select: Selection | None = None) -> tuple[Why, ...]:
    """Return how each attempt of runs ended, and what was decided then."""
    return tuple(map(_why, selected(runs, root, select)))


def _why(paths: RunPaths) -> Why:
    from launcher.attempts.remedies import remedies
    from launcher.contract.spec import read_resolved
    from launcher.runs.first_failure import newest_error
    from launcher.views.why import decisions, explain

    decided, error = decisions(paths), newest_error(paths)
    helps: tuple[Remedy, ...] = ()
    with contextlib.suppress(LauncherError):  # a config that is damaged must not hide the history
        helps = tuple(remedies(read_resolved(paths.config), decided[-1], error)) if decided else ()
    return Why(run=paths.name, decisions=decided, history=explain(paths), error=error, remedies=helps)


def logs(run: Run, choice: Choice | None = None, *, root: Path | None = None) -> Logs:
    """Return which log files of a run are meant, by default that of rank 0 in the newest attempt."""
    return choose(find_run(str(run), root or default_run_root()), choice or Choice())


def report(run: Run, *, root: Path | None = None, output: Path | None = None) -> Report:
    """Write curves, attempts, config and events of a run as one HTML page, by default RUN/report.html."""
    from launcher.views.report import write_report

    paths = find_run(str(run), root or default_run_root())
    target = output or paths.root / "report.html"
    write_report(paths, target)
    return Report(run=paths.name, file=str(target))


def results(
    group: str, *, root: Path | None = None, sort: str | None = None, descending: bool = False
) -> tuple[RunResult, ...]:
    """Return what each run of a sweep set and the last value of every metric that it logged, sorted by a metric."""
    from launcher.sweeps.groups import find_runs, read_group, sort_results
    from launcher.sweeps.groups import results as results_of

    root = root or default_run_root()
    listed = read_group(group, root)
    return tuple(sort_results(results_of(find_runs(group, root), listed.points if listed else {}), sort, descending))


def selected(runs: Sequence[Run], root: Path | None, select: Selection | None) -> list[RunPaths]:
    """Return the runs that were named, or all of `root`, as far as the selection has them."""
    from launcher.runs.find import all_runs

    chosen = found(runs, root) if runs else all_runs(root or default_run_root())
    return chosen if select is None else select.of(chosen)
