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
)
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.api.live import Usage
    from launcher.runs.usage import Sum


def add(commands: Subcommands) -> None:
    """Declare the command."""
    usage = command(commands, "usage", _usage, "GPU hours of runs, those that were wasted apart")
    runs_argument(usage, "*")
    cluster_option(usage)
    usage.add_argument(
        "--by", default="run", metavar="WORD", help="run (default), user, group, state, cause, or a key of the config"
    )
    usage.add_argument("--name", metavar="GLOB", help="runs whose name fits the pattern, e.g. 'llama-*'")
    usage.add_argument("--group", metavar="NAME", help="runs of this sweep")
    usage.add_argument("--since", metavar="WHEN", help="created since then: 12h, 3d, 2026-11-24")
    json_option(usage)


def _usage(options: argparse.Namespace) -> int:
    from launcher.api.live import usage
    from launcher.runs.selection import Selection, parse_since

    since = parse_since(options.since) if options.since else None
    select = Selection(name=options.name, group=options.group, since=since)
    told = usage(options.runs, root=options.run_root, select=select, by=options.by)
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
