"""Arguments that commands share, and the declaration of a command."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from launcher.commands.completion import CLUSTER, FILE, KEY, RUN, completed
from launcher.contract.jsonable import jsonable

if TYPE_CHECKING:
    from launcher.runs.selection import Selection

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


def selection_options(parser: argparse.ArgumentParser) -> None:
    """Add --name, --group and --since, which select runs. A command that also selects by state adds --state itself."""
    parser.add_argument("--name", metavar="GLOB", help="runs whose name fits the pattern, e.g. 'llama-*'")
    completed(parser.add_argument("--group", metavar="NAME", help="runs of this sweep"), RUN)
    parser.add_argument("--since", metavar="WHEN", help="created since then: 12h, 3d, 2026-11-24")


def selection_of(options: argparse.Namespace) -> Selection:
    """Return which runs the options select, or raise ConfigError for a time or a state that is none."""
    from launcher.runs.selection import Selection, parse_since, parse_states

    since = parse_since(options.since) if options.since else None
    states = parse_states(getattr(options, "state", []))
    return Selection(name=options.name, group=options.group, since=since, states=states)


def print_json(value: object) -> None:
    """Print a dataclass, or several, as JSON for programs."""
    print(json_text(value))


def json_text(value: object) -> str:
    """Return what `print_json` prints."""
    return json.dumps(jsonable(value), indent=2, ensure_ascii=False)
