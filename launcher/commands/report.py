"""report: a run as one HTML page."""

from __future__ import annotations

import argparse
from pathlib import Path

from launcher.commands.arguments import Subcommands, chosen_run, cluster_option, command, run_argument
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the command."""
    parser = command(commands, "report", _report, "write curves, attempts, config and events of a run as one HTML page")
    run_argument(parser)
    cluster_option(parser)
    parser.add_argument("--output", type=Path, metavar="FILE", help="default RUN/report.html")


def _report(options: argparse.Namespace) -> int:
    from launcher.views.report import write_report

    paths = chosen_run(options)
    target = options.output or paths.root / "report.html"
    write_report(paths, target)
    print(target)
    return int(ExitCode.OK)
