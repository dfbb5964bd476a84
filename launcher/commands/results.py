"""results: the runs of a sweep side by side."""

from __future__ import annotations

import argparse

from launcher.commands.arguments import Subcommands, cluster_option, command, json_option, print_json, run_root_option
from launcher.commands.completion import RUN, completed
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    results = command(commands, "results", _results, "what the runs of a sweep set, and the metrics they reached")
    run_root_option(results)
    cluster_option(results)
    group = results.add_argument(
        "group", metavar="GROUP", help="the name in the sweep's config; a run's name works too"
    )
    completed(group, RUN)
    results.add_argument("--sort", metavar="METRIC", help="e.g. eval_loss; default loss")
    results.add_argument("--descending", action="store_true", help="highest first")
    json_option(results)


def _results(options: argparse.Namespace) -> int:
    from launcher.api.runs import results, status
    from launcher.views.text import columns

    sort = options.sort or "loss"
    rows = results(options.group, root=options.run_root, sort=options.sort, descending=options.descending)
    if options.json:
        print_json(rows)
        return int(ExitCode.OK)
    states = {row.run: row.state.value for row in status([options.group], root=options.run_root).rows}
    swept = list(dict.fromkeys(key for row in rows for key in row.set))
    shown = [name for name in ("step", "loss") if name != sort]
    head = ["RUN", "STATE", *swept, sort, *shown]
    body = [
        [row.run, states[row.run], *(row.set.get(key, "-") for key in swept)]
        + [_number(row.metrics.get(name)) for name in (sort, *shown)]
        for row in rows
    ]
    print(columns([head, *body]))
    return int(ExitCode.OK)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
