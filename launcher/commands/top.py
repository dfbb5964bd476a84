"""top: one screen for all runs."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from launcher.commands.arguments import (
    Subcommands,
    cluster_option,
    command,
    runs_argument,
    selection_of,
    selection_options,
)
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.runs.state import RunStatus


def add(commands: Subcommands) -> None:
    """Declare the command."""
    top = command(commands, "top", _top, "one screen for all runs: curves, queue, faults, and keys to act on them")
    runs_argument(top, "*")
    cluster_option(top)
    selection_options(top)


def _top(options: argparse.Namespace) -> int:
    from launcher.contract.errors import ConfigError

    if importlib.util.find_spec("rich") is None:
        raise ConfigError("top needs the package rich: pip install rich; `launcher status --watch` works without it")
    from launcher.api.runs import status
    from launcher.views.top import print_once, watch_all

    select = selection_of(options)

    def pick() -> tuple[Sequence[RunStatus], str | None]:
        states = status(options.runs, root=options.run_root, select=select)
        return states.rows, states.problem

    if sys.stdin.isatty() and sys.stdout.isatty():
        watch_all(pick)
    else:
        print_once(pick)
    return int(ExitCode.OK)
