"""Arguments that commands share, and the declaration of a command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from launcher.commands.completion import CLUSTER, FILE, KEY, RUN, completed
from launcher.contract.jsonable import jsonable

Handler = Callable[[argparse.Namespace], int]


class Subcommands(Protocol):
    """What argparse's `add_subparsers` returns, which has no public type."""

    def add_parser(self, name: str, *, help: str, description: str) -> argparse.ArgumentParser: ...


def command(commands: Subcommands, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    """Declare and return the command `name`. `handler` gets the parsed options and returns the exit code."""
    parser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(handler=handler)
    # SUPPRESS: the subcommand's default would undo a --debug given before it
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser


def config_argument(parser: argparse.ArgumentParser) -> None:
    """Add the YAML file of a run, completed as a file."""
    completed(parser.add_argument("config", type=Path, help="the YAML file of the run, or - for standard input"), FILE)


def override_arguments(parser: argparse.ArgumentParser) -> None:
    """Add settings on the command line, and another cluster."""
    words = parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="settings that win over the file's"
    )  # without a default, argparse calls them required where the config is missing
    completed(words, KEY)
    cluster = parser.add_argument("--cluster", metavar="NAME", help="a file in cluster_configs/ to use instead")
    completed(cluster, CLUSTER)


def json_option(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_root_option(parser: argparse.ArgumentParser) -> None:
    """Add --run-root."""
    parser.add_argument("--run-root", type=Path, help="where runs are; default SFT_RUN_ROOT or runs")


def cluster_option(parser: argparse.ArgumentParser) -> None:
    """Add --cluster, for commands on runs."""
    cluster = parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="the runs are on this cluster's host; default SFT_CLUSTER, or where they were submitted to from here",
    )
    completed(cluster, CLUSTER)


def run_argument(parser: argparse.ArgumentParser) -> None:
    """Add one run, and where runs are."""
    run_root_option(parser)
    completed(parser.add_argument("run", metavar="RUN", help="a run's name or directory"), RUN)


def runs_argument(parser: argparse.ArgumentParser, count: str) -> None:
    """Add several runs (`count` as in argparse's nargs), and where runs are."""
    run_root_option(parser)
    completed(parser.add_argument("runs", metavar="RUN", nargs=count, help="runs' names or directories"), RUN)


def print_json(value: object) -> None:
    """Print a dataclass, or several, as JSON for programs."""
    print(json_text(value))


def json_text(value: object) -> str:
    """Return what `print_json` prints."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False)
