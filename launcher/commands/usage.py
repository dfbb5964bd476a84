"""usage: the GPU hours that runs have used, and what became of them."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    chosen_runs,
    cluster_option,
    command,
    json_option,
    print_json,
    runs_argument,
)
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.runs.usage import Sum, Use


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
    from launcher.runs.find import all_runs, default_run_root
    from launcher.runs.selection import Selection, parse_since
    from launcher.runs.usage import by_key, total, uses

    selection = Selection(
        name=options.name, group=options.group, since=parse_since(options.since) if options.since else None
    )
    runs = selection.of(chosen_runs(options) or all_runs(options.run_root or default_run_root()))
    found, unreadable = uses(runs)
    sums = by_key(found, options.by, runs)
    if options.json:
        print_json(
            {
                "by": options.by,
                "sums": [{"word": word, **dataclasses.asdict(one)} for word, one in sums.items()],
                "total": dataclasses.asdict(total(found)),
                "attempts": [_as_json(use) for use in found],
            }
        )
    else:
        print(_table(options.by, sums, total(found), found))
    for problem in unreadable:
        print(f"not counted: {problem}", file=sys.stderr)
    return int(ExitCode.OK)


def _as_json(use: Use) -> dict[str, object]:
    hours = {"gpu_hours": use.gpu_hours, "wasted_gpu_hours": use.wasted_gpu_hours, "node_hours": use.node_hours}
    return {**dataclasses.asdict(use), "state": use.state.value, **hours}


def _table(word: str, sums: dict[str, Sum], whole: Sum, found: list[Use]) -> str:
    from launcher.views.text import columns

    head = (word.upper(), "ATTEMPTS", "NODE HOURS", "GPU HOURS", "WASTED", "")
    rows = [_cells(name, one) for name, one in sums.items()]
    told = sum(use.source == "events" for use in found)
    source = "the scheduler's accounting" if not told else "the runs' own events"
    if 0 < told < len(found):
        source = f"the scheduler's accounting, {told} of {len(found)} attempts from the runs' own events"
    return f"{columns([head, *rows, _cells('total', whole)])}\nfrom {source}"


def _cells(name: str, one: Sum) -> tuple[str, ...]:
    share = f"{one.wasted_gpu_hours / one.gpu_hours:.0%}" if one.gpu_hours else ""
    return (
        name,
        str(one.attempts),
        f"{one.node_hours:,.2f}",
        f"{one.gpu_hours:,.2f}",
        f"{one.wasted_gpu_hours:,.2f}",
        share,
    )
