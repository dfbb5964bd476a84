"""Arguments that commands share, and how a command is declared."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Handler = Callable[[argparse.Namespace], int]


def command(commands: Any, name: str, handler: Handler, about: str) -> argparse.ArgumentParser:
    """Declare the command `name`; `handler` gets the parsed options and returns the exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=about, description=about)
    parser.set_defaults(handler=handler)
    # SUPPRESS: the subcommand's default would undo a --debug given before it
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
    return parser


def config_argument(parser: argparse.ArgumentParser) -> None:
    """The YAML file of a run, completed as a file."""
    config = parser.add_argument("config", type=Path, help="the YAML file of the run")
    config.complete = _FILE  # type: ignore[attr-defined]  # read by shtab


_FILE = {"bash": "_shtab_compgen_files", "zsh": "_files", "tcsh": "f"}


def override_arguments(parser: argparse.ArgumentParser) -> None:
    """Settings on the command line, and another cluster."""
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that win over the file's")
    parser.add_argument("--cluster", metavar="NAME", help="a file in cluster_configs/ to use instead of the config's")


def json_option(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run_root_option(parser: argparse.ArgumentParser) -> None:
    """--run-root."""
    parser.add_argument("--run-root", type=Path, help="where runs are; default SFT_RUN_ROOT or runs")


def cluster_option(parser: argparse.ArgumentParser) -> None:
    """--cluster, for commands on runs."""
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="the runs are on this cluster's host; default SFT_CLUSTER, or where they were submitted to from here",
    )


def run_argument(parser: argparse.ArgumentParser) -> None:
    """One run, and where runs are."""
    run_root_option(parser)
    parser.add_argument("run", metavar="RUN", help="a run's name or directory")


def runs_argument(parser: argparse.ArgumentParser, count: str) -> None:
    """Several runs (`count` as in argparse's nargs), and where runs are."""
    run_root_option(parser)
    parser.add_argument("runs", metavar="RUN", nargs=count, help="runs' names or directories")


def chosen_run(options: argparse.Namespace) -> Any:
    """The RunPaths of `run_argument`."""
    from launcher.runs.find import default_run_root, find_run

    return find_run(options.run, options.run_root or default_run_root())


def chosen_runs(options: argparse.Namespace) -> list[Any]:
    """The RunPaths of `runs_argument`, groups in full; empty where none was named."""
    from launcher.runs.find import default_run_root
    from launcher.sweeps.groups import find_runs

    root = options.run_root or default_run_root()
    return [run for word in options.runs for run in find_runs(word, root)]


def print_json(value: Any) -> None:
    """JSON for programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
