"""status, list: what runs there are, and how they are."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    chosen_runs,
    cluster_option,
    command,
    json_option,
    print_json,
    run_root_option,
    runs_argument,
)
from launcher.commands.completion import RUN, STATE, completed
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.contract.rundir import RunPaths
    from launcher.runs.selection import Selection
    from launcher.runs.state import RunStatus


def add(commands: Subcommands) -> None:
    """Declare the commands."""
    status = command(commands, "status", _status, "state and progress of runs")
    runs_argument(status, "*")
    status.add_argument("--why", action="store_true", help="tell how each attempt ended, what was decided, and why")
    listing = command(commands, "list", _list, "runs by their files alone; asks no scheduler")
    run_root_option(listing)
    status.add_argument("--watch", action="store_true", help="show it again and again, until all runs have ended")
    for parser in (status, listing):
        cluster_option(parser)
        json_option(parser)
        parser.add_argument("--name", metavar="GLOB", help="runs whose name fits the pattern, e.g. 'llama-*'")
        completed(parser.add_argument("--group", metavar="NAME", help="runs of this sweep"), RUN)
        parser.add_argument("--since", metavar="WHEN", help="created since then: 12h, 3d, 2026-11-24")
        states = parser.add_argument(
            "--state", action="append", default=[], metavar="STATE", help="e.g. running,pending"
        )
        completed(states, STATE)


def _selection(options: argparse.Namespace) -> Selection:
    from launcher.runs.selection import Selection, parse_since, parse_states

    since = parse_since(options.since) if options.since else None
    return Selection(name=options.name, group=options.group, since=since, states=parse_states(options.state))


def _status(options: argparse.Namespace) -> int:
    from launcher.runs.find import all_runs, default_run_root
    from launcher.runs.state import collect
    from launcher.views.status_table import status_table
    from launcher.views.text import terminal_width

    root, selection = options.run_root or default_run_root(), _selection(options)

    def pick() -> tuple[list[RunStatus], str | None]:
        rows, problem = collect(selection.of(chosen_runs(options) or all_runs(root)))
        return [row for row in rows if selection.fits(row.state)], problem

    if options.why:
        return _why(options, selection.of(chosen_runs(options) or all_runs(root)))
    if options.watch:
        from launcher.views.watch import watch

        watch(pick)
        return int(ExitCode.OK)
    rows, problem = pick()
    if options.json:
        print_json([row.as_json() for row in rows])
    elif rows:
        print(status_table(rows, terminal_width()))
    else:
        print(f"no runs in {root.absolute()}", file=sys.stderr)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return int(ExitCode.SCHEDULER)
    return int(ExitCode.OK)


def _why(options: argparse.Namespace, runs: list[RunPaths]) -> int:
    from launcher.views.why import decisions, explain

    if options.json:
        print_json([{"run": paths.name, "decisions": decisions(paths)} for paths in runs])
    else:
        print("\n\n".join(map(explain, runs)))
    return int(ExitCode.OK)


def _list(options: argparse.Namespace) -> int:
    from launcher.runs.find import all_runs, default_run_root
    from launcher.runs.listing import listing
    from launcher.views.text import columns

    selection = _selection(options)
    rows = listing(selection.of(all_runs(options.run_root or default_run_root())))
    if selection.states:  # by the files alone, a run that is not known to have ended goes on
        names = {state.value for state in selection.states}
        rows = [row for row in rows if row["state"] in names]
    if options.json:
        print_json(rows)
    else:
        head = ("RUN", "STATE", "PHASE", "CREATED", "TOPOLOGY", "PARENT")
        body = [
            (
                row["run"],
                row["state"] or "-",
                row["phase"] if row["phase"] and not row["state"] else "-",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created_at"])),
                row["topology"],
                Path(row["parent_run"]).name if row["parent_run"] else "-",
            )
            for row in rows
        ]
        print(columns([head, *body]))
    return int(ExitCode.OK)
