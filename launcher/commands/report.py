"""report: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands.arguments import Subcommands, cluster_option, command, json_option, print_json, run_argument
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(commands, "report", _report, "write curves, attempts, config and events of a run as one HTML page")
    run_argument(parser)
    cluster_option(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default RUN/report.html")
    json_option(parser)


def _report(options: argparse.Namespace) -> int:
    from launcher.api.runs import report

    made = report(options.run, root=options.run_root, output=options.output)
    if options.json:
        print_json(made)
    else:
        print(made.file)
    return int(ExitCode.OK)
