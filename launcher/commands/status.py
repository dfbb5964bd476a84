"""status, list: what runs there are, and how they are."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from launcher.commands import chosen_runs, command, json_option, print_json, run_root_option, runs_argument
from launcher.exit_codes import ExitCode


def add(commands: Any) -> None:
    """Declare the commands."""
    status = command(commands, "status", _status, "state and progress of runs")
    runs_argument(status, "*")
    listing = command(commands, "list", _list, "runs by their files alone; asks no scheduler")
    run_root_option(listing)
    json_option(status)
    json_option(listing)


def _status(options: argparse.Namespace) -> int:
    from launcher.runs import all_runs, default_run_root
    from launcher.status import collect
    from launcher.table import table, terminal_width

    root = options.run_root or default_run_root()
    runs = chosen_runs(options) or all_runs(root)
    rows, problem = collect(runs)
    if options.json:
        print_json([row.as_json() for row in rows])
    elif rows:
        print(table(rows, terminal_width()))
    else:
        print(f"no runs in {root.absolute()}", file=sys.stderr)
    if problem is not None:
        print(f"error: {problem}", file=sys.stderr)
        return int(ExitCode.SCHEDULER)
    return int(ExitCode.OK)


def _list(options: argparse.Namespace) -> int:
    from launcher.runs import all_runs, default_run_root, listing
    from launcher.table import columns

    rows = listing(all_runs(options.run_root or default_run_root()))
    if options.json:
        print_json(rows)
    else:
        head = ("RUN", "STATE", "CREATED", "TOPOLOGY", "PARENT")
        body = [
            (
                row["run"],
                row["state"] or "-",
                time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created_at"])),
                row["topology"],
                Path(row["parent_run"]).name if row["parent_run"] else "-",
            )
            for row in rows
        ]
        print(columns([head, *body]))
    return int(ExitCode.OK)
