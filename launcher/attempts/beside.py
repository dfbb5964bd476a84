"""`python -m launcher.attempts.beside stacks|shell RUN --attempt A`: what runs on a node beside the ranks of a run.

`stacks` asks every rank of this node where it stands, and prints what they say as JSON lines. `shell` becomes a shell,
or a given program, in the environment of a rank. The launcher starts both by a step that overlaps that of the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.attempts.rank_stacks import host, lines_of_node, process_of
from launcher.contract import processes
from launcher.contract.exit_codes import ExitCode

MARK = "sft-stacks "
"""Begins each line that `stacks` prints: containers and login scripts print lines of their own."""

_PATIENCE = 5.0
"""Seconds for a rank to answer."""
_OF_RANKS = re.compile(r"(SFT|SLURM|SRUN|PMI)\w*|((LOCAL|GROUP|ROLE|NODE)_)?RANK|(LOCAL_)?WORLD_SIZE|MASTER_\w+")
"""Variables that make a process part of a run: with them a shell's programs could write to it, or join its ranks."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(prog="python -m launcher.attempts.beside", description="Look at a run's ranks.")
    commands = parser.add_subparsers(required=True)
    for name, run, about in (
        ("stacks", _stacks, "print where each rank of this node stands"),
        ("shell", _shell, "become a shell in the environment of a rank"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("run", type=Path, help="the run directory")
        command.add_argument("--attempt", required=True, help="name of the attempt")
        command.set_defaults(run_command=run)
        if name == "shell":
            command.add_argument("--rank", type=int, required=True, help="number of the rank")
            command.epilog = "What follows -- runs instead of a shell."
    words = list(sys.argv[1:] if arguments is None else arguments)
    end = words.index("--") if "--" in words else len(words)
    options = parser.parse_args(words[:end])
    options.program = words[end + 1 :]  # argparse would look for options in it
    return int(options.run_command(options))


def _stacks(options: argparse.Namespace) -> int:
    for line in lines_of_node(options.run, options.attempt, _PATIENCE):
        print(MARK + json.dumps(line))  # only ASCII, which any locale of a node can print
    return int(ExitCode.OK)


def _shell(options: argparse.Namespace) -> int:
    pid = process_of(options.run, options.attempt, options.rank, _PATIENCE)
    if pid is None:
        print(f"error: rank {options.rank} has no process on {host()} any more", file=sys.stderr)
        return int(ExitCode.CONFLICT)
    environment = shell_environment(processes.environment(pid), os.environ)
    with contextlib.suppress(OSError):
        os.chdir(Path(f"/proc/{pid}/cwd").readlink())
    words = options.program or [_shell_of(environment)]
    if not options.program:
        about = f"beside rank {options.rank} on {host()}, process {pid}"
        print(f"{about}; the ranks go on, and `exit` leaves this shell", file=sys.stderr, flush=True)
    try:
        os.execvpe(words[0], words, environment)
    except OSError as error:
        print(f"error: {words[0]}: {error.strerror}", file=sys.stderr)
        return 127


def shell_environment(of_rank: Mapping[str, str], own: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a rank without what makes it a rank, with this step's own variables of Slurm."""
    kept = {name: value for name, value in of_rank.items() if not _OF_RANKS.fullmatch(name)}
    return {**kept, **{name: value for name, value in own.items() if name.startswith("SLURM") or name == "TERM"}}


def _shell_of(environment: Mapping[str, str]) -> str:
    """Return the user's shell, or another one where a container lacks it."""
    wanted = (environment.get("SHELL", ""), "bash")
    return next((shell for shell in wanted if shell and shutil.which(shell, path=environment.get("PATH"))), "sh")


if __name__ == "__main__":
    sys.exit(main())
