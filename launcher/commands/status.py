"""status, list: what runs there are, and how they are."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    cluster_option,
    command,
    json_option,
    print_json,
    run_root_option,
    runs_argument,
    selection_of,
    selection_options,
)
from launcher.commands.completion import STATE, completed
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.api.runs import States


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
        selection_options(parser)
        states = parser.add_argument(
            "--state", action="append", default=[], metavar="STATE", help="e.g. running,pending"
        )
        completed(states, STATE)


def _status(options: argparse.Namespace) -> int:
    from launcher.api.runs import status
    from launcher.contract.rundir import default_run_root
    from launcher.views.status_table import status_table
    from launcher.views.text import terminal_width

    if options.why:
        return _why(options)
    root, selection = options.run_root or default_run_root(), selection_of(options)

    def pick() -> States:
        return status(options.runs, root=root, select=selection)

    if options.watch:
        from launcher.views.watch import watch

        watch(lambda: (list((shown := pick()).rows), shown.problem))
        return int(ExitCode.OK)
    found = pick()
    if options.json:
        print_json(found.rows)
    elif found.rows:
        print(status_table(found.rows, terminal_width()))
    else:
        print(f"no runs in {root.absolute()}", file=sys.stderr)
    if found.problem is not None:
        print(f"error: {found.problem}", file=sys.stderr)
        return int(ExitCode.SCHEDULER)
    return int(ExitCode.OK)


def _why(options: argparse.Namespace) -> int:
    from launcher.api.runs import why

    runs = why(options.runs, root=options.run_root, select=selection_of(options))
    if options.json:
        print_json(runs)
    else:
        print("\n\n".join(run.history for run in runs))
    return int(ExitCode.OK)


def _list(options: argparse.Namespace) -> int:
    from launcher.api.runs import list_runs
    from launcher.views.text import columns

    rows = list_runs(root=options.run_root, select=selection_of(options))
    if options.json:
        print_json(rows)
        return int(ExitCode.OK)
    head = ("RUN", "STATE", "PHASE", "CREATED", "TOPOLOGY", "PARENT")
    body = [
        (
            row.run,
            row.state or "-",
            row.phase if row.phase and not row.state else "-",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row.created_at)),
            row.topology,
            Path(row.parent_run).name if row.parent_run else "-",
        )
        for row in rows
    ]
    print(columns([head, *body]))
    return int(ExitCode.OK)
