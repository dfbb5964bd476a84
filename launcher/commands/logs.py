"""logs, wait: what a run prints, and how it ends."""

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
    run_argument,
    runs_argument,
)
from launcher.contract.argument_types import count, seconds
from launcher.contract.exit_codes import ExitCode

if TYPE_CHECKING:
    from launcher.contract.rundir import RunPaths
    from launcher.runs.state import RunStatus
    from launcher.views.log_files import Choice

_JSON_LINES = 100


def add(commands: Subcommands) -> None:
    """Declare the commands."""
    parser = command(commands, "logs", _logs, "print the logs of a run")
    run_argument(parser)
    cluster_option(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--rank", metavar="RANKS", help="logs of these ranks, e.g. 3 or 0,3-5 (default 0)")
    which.add_argument("--all", action="store_true", help="logs of all ranks, each line with its rank")
    which.add_argument("--batch", action="store_true", help="the batch script's log: prepare, export, how ranks ended")
    which.add_argument("--failed", action="store_true", help="last words of the rank that failed first")
    parser.add_argument("--attempt", metavar="A", help="default: the newest")
    parser.add_argument("-f", "--follow", action="store_true", help="print more as it comes, until the attempt ends")
    parser.add_argument(
        "-n", "--lines", type=count, metavar="N", help="only the last N of each log (default: all; with --json 100)"
    )
    json_option(parser)
    wait = command(commands, "wait", _wait, "wait until runs have ended; exits with the first code that is not 0")
    runs_argument(wait, "+")
    cluster_option(wait)
    wait.add_argument("--timeout", type=seconds, metavar="SECONDS", help="give up after this long, with exit code 124")


def _logs(options: argparse.Namespace) -> int:
    from launcher.api.runs import logs
    from launcher.contract.errors import ConfigError
    from launcher.contract.rundir import default_run_root
    from launcher.runs.find import find_run
    from launcher.views.log_files import Choice, parse_ranks
    from launcher.views.logs import show

    choice = Choice(
        ranks=parse_ranks(options.rank) if options.rank else (),
        all_ranks=options.all,
        batch=options.batch,
        failed=options.failed,
        attempt=options.attempt,
    )
    if options.follow and (options.failed or options.json):
        other = "--failed" if options.failed else "--json"
        raise ConfigError(f"--follow prints what comes, and {other} is printed once; leave one of them out")
    if options.lines and options.failed:
        raise ConfigError("--lines is for whole logs; --failed prints the end of one, from its last error on")
    if options.follow:
        return follow_run(find_run(options.run, options.run_root or default_run_root()), choice, options.lines)
    found = logs(options.run, choice, root=options.run_root)
    if options.json:
        print_json(found.text(options.lines or _JSON_LINES))
    else:
        show(found, options.lines)
    return int(ExitCode.OK)


def follow_run(paths: RunPaths, choice: Choice, lines: int | None = None) -> int:
    """Show a run's logs until it has ended and return its exit code. Ctrl-C ends the showing only.

    `lines` is how many of those that are there already are shown; None shows all.
    """
    from launcher.submission.summary import run_root_words
    from launcher.views.logs import follow

    try:
        return exit_with(follow(paths, choice, lines))
    except KeyboardInterrupt:
        where = f"{paths.name}{run_root_words(paths.root.parent)}"
        print(
            f"\nrun {paths.name} goes on; `launcher logs -f {where}` shows it again, `launcher cancel {where}` ends it",
            file=sys.stderr,
        )
        return int(ExitCode.INTERRUPTED)


def _wait(options: argparse.Namespace) -> int:
    from launcher.api.runs import wait

    rows = wait(options.runs, root=options.run_root, timeout=options.timeout)
    if rows is None:
        return int(ExitCode.TIMED_OUT)
    return next((code for code in map(exit_with, rows) if code), int(ExitCode.OK))


def exit_with(status: RunStatus) -> int:
    """Return the run's own exit code, or that of a failure where it ended without one."""
    from launcher.contract.job_state import JobState

    if status.state is JobState.COMPLETED:
        return int(ExitCode.OK)
    return int(status.exit_code or ExitCode.FAILURE)
