"""usage: the GPU hours that runs have used, and what became of them."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    cluster_option,
    command,
    json_option,
    print_json,
    runs_argument,
    selection_of,
    selection_options,
)
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.api.live import Usage
    from launcher.runs.usage import Sum


def add(commands: Subcommands) -> None:
    """Declare the command."""
    usage = command(commands, "usage", _usage, "GPU hours of runs, and how many of them were wasted")
    runs_argument(usage, "*")
    cluster_option(usage)
    usage.add_argument(
        "--by", default="run", metavar="WORD", help="run (default), user, group, state, cause, or a key of the config"
    )
    selection_options(usage)
    json_option(usage)


def _usage(options: argparse.Namespace) -> int:
    from launcher.api.live import usage

    told = usage(options.runs, root=options.run_root, select=selection_of(options), by=options.by)
    if options.json:
        print_json(told)
        return int(ExitCode.OK)
    if told.attempts:
        print(_table(told))
    else:
        print("no attempt has started", file=sys.stderr)
    for problem in told.unreadable:
        print(f"not counted: {problem}", file=sys.stderr)
    return int(ExitCode.OK)


def _table(told: Usage) -> str:
    from launcher.views.text import columns

    head = (told.by.upper(), "ATTEMPTS", "NODE HOURS", "GPU HOURS", "WASTED", "")
    count = len(told.attempts)
    by_events = sum(use.source == "events" for use in told.attempts)
    source = "the scheduler's accounting" if not by_events else "the runs' own events"
    if 0 < by_events < count:
        source = f"the scheduler's accounting, {by_events} of {count} attempts from the runs' own events"
    return f"{columns([head, *map(_cells, told.sums), _cells(told.total)])}\nfrom {source}"


def _cells(one: Sum) -> tuple[str, ...]:
    share = f"{one.wasted_gpu_hours / one.gpu_hours:.0%}" if one.gpu_hours else ""
    hours = (one.node_hours, one.gpu_hours, one.wasted_gpu_hours)
    return (one.word, str(one.attempts), *(f"{each:,.2f}" for each in hours), share)
