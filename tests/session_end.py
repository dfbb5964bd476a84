"""End what a test session has started once the session is over, even if it was killed with signal 9.

A process of its own holds a pipe to pytest. When the pipe closes, it kills every process that carries the session's
mark in its environment: ranks, local runs, daemons, commands. Job steps on a test cluster get their environment from
Slurm; they are recognised by a SLURM_CONF below the session's scratch folder. Rejected: `prctl(PR_SET_PDEATHSIG)`
alone, which a process does not hand on to its children; slurmd, ended by it, leaves its job steps to themselves.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

MARK = "SFT_TEST_SESSION"
"""Variable that the processes of a session carry; its value is the session's own."""

_PATIENCE = 60.0


def mark_session() -> None:
    """Mark what this process starts from now on."""
    os.environ[MARK] = uuid.uuid4().hex


def mark() -> dict[str, str]:
    """Return the mark as variables, for processes that do not inherit the environment."""
    return {MARK: os.environ[MARK]} if MARK in os.environ else {}


def start_watcher(scratch: Path) -> subprocess.Popen[bytes]:
    """Start the process that ends what is left when this one is gone, or closes the pipe."""
    command = [sys.executable, "-S", __file__, os.environ[MARK], str(scratch)]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True)


def processes_of(token: str, scratch: str) -> Iterator[int]:
    """Yield the ids of the processes of a session, this one left out."""
    marked, below = f"{MARK}={token}".encode(), f"SLURM_CONF={scratch}/".encode()
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (directory / "environ").read_bytes().split(b"\0")
            if int(directory.name) != os.getpid() and any(v == marked or v.startswith(below) for v in variables):
                yield int(directory.name)


def _watch(token: str, scratch: str) -> None:
    session = os.getppid()
    while os.getppid() == session:  # a child that pytest forked may hold the pipe as well, and outlive pytest
        if select.select([sys.stdin], [], [], 1.0)[0]:
            break
    deadline = time.monotonic() + _PATIENCE
    rounds_without = 0
    while rounds_without < 3 and time.monotonic() < deadline:
        found = list(processes_of(token, scratch))
        rounds_without = 0 if found else rounds_without + 1
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


if __name__ == "__main__":
    _watch(*sys.argv[1:])
