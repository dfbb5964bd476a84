"""stacks, shell: look at the ranks of a run while they work."""

from __future__ import annotations

import argparse
import os
import sys

from launcher.commands.arguments import (
    Subcommands,
    cluster_option,
    command,
    json_option,
    print_json,
    run_argument,
)
from launcher.contract.exit_codes import ExitCode


def add(commands: Subcommands) -> None:
    """Declare the commands."""
    stacks = command(commands, "stacks", _stacks, "where every rank of a running run stands; disturbs none of them")
    run_argument(stacks)
    cluster_option(stacks)
    stacks.add_argument("--threads", action="store_true", help="all Python threads, not only the main one")
    json_option(stacks)
    shell = command(commands, "shell", _shell, "a shell, or PROGRAM after --, beside a rank of a running run")
    run_argument(shell)
    cluster_option(shell)
    shell.add_argument("--rank", type=int, default=0, metavar="N", help="beside this rank, in its environment")
    shell.set_defaults(program=[])


def _stacks(options: argparse.Namespace) -> int:
    from launcher.api.live import stacks
    from launcher.views.stacks import render

    told = stacks(options.run, root=options.run_root)
    if options.json:
        print_json(told)
    else:
        print(render(told, all_threads=options.threads))
    return int(ExitCode.OK)


def _shell(options: argparse.Namespace) -> int:
    from launcher.contract.rundir import default_run_root
    from launcher.runs.find import find_run
    from launcher.submission.beside import live_attempt, shell_words

    paths = find_run(options.run, options.run_root or default_run_root())
    words, environment = shell_words(live_attempt(paths), options.rank, options.program)
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)  # the terminal and its signals are the program's
