"""logs: what a run printed."""

from __future__ import annotations

import argparse
from typing import Any

from launcher.commands import chosen_run, command, run_argument
from launcher.exit_codes import ExitCode


def add(commands: Any) -> None:
    """Declare the command."""
    parser = command(commands, "logs", _logs, "print the logs of a run")
    run_argument(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, metavar="N", help="this rank's log (default 0)")
    which.add_argument("--batch", action="store_true", help="the batch script's log: prepare, export, how ranks ended")
    parser.add_argument("--attempt", metavar="A", help="default: the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="print more as it comes, until the attempt ends")


def _logs(options: argparse.Namespace) -> int:
    from launcher import logs

    paths = chosen_run(options)
    choice = {"rank": options.rank, "attempt": options.attempt, "batch": options.batch}
    if options.follow:
        return exit_with(logs.follow(paths, **choice))
    logs.show(paths, **choice)
    return int(ExitCode.OK)


def exit_with(status: Any) -> int:
    """The run's own exit code; a run that ended without one has failed."""
    from launcher.state import JobState

    if status.exit_code is not None:
        return int(status.exit_code)
    return int(ExitCode.OK if status.state is JobState.COMPLETED else ExitCode.FAILURE)
