"""stacks, shell: look at the ranks of a run while they work."""

from __future__ import annotations

import argparse
import os
import sys

from launcher.commands.arguments import (
    Subcommands,
    chosen_run,
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
    from launcher.submission.beside import ask_ranks, live_attempt
    from launcher.views.stacks import gather, render

    live = live_attempt(chosen_run(options))
    stacks = gather(live.paths.name, live.name, len(live.hosts), live.ranks, ask_ranks(live))
    if options.json:
        print_json(stacks.as_json())
    else:
        print(render(stacks, all_threads=options.threads))
    return int(ExitCode.OK)


def _shell(options: argparse.Namespace) -> int:
    from launcher.submission.beside import live_attempt, shell_words

    words, environment = shell_words(live_attempt(chosen_run(options)), options.rank, options.program)
    sys.stdout.flush()
    os.execvpe(words[0], words, environment)  # the terminal and its signals are the program's
