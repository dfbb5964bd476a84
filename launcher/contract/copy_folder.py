"""Where a node keeps copies of runs' states: folders in its memory, which ranks fill and batch scripts remove.

A folder, `sft-copies-<uid>-<job>.<restarts>-<run>-<node>`, belongs to one user, start of a job, run and node. In it,
`run` names the run directory, by whose lease anybody can tell whether the copies are still of use.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from launcher.contract import lease
from launcher.contract.job import AttemptName
from launcher.contract.private_folder import is_private
from launcher.contract.rundir import RunPaths, write_atomic

MEMORY = Path("/dev/shm")
"""A file system in memory that every Linux machine has."""
PREFIX = "sft-copies-"

_NAME = re.compile(rf"{PREFIX}[0-9]+-(?P<start>[^-]+\.[0-9]+)-[0-9a-f]+-.+")
_RUN = "run"
_UNKNOWN = "unknown"


def start_of(attempt: str) -> str | None:
    """Return the start of the job that an attempt belongs to, `<job>.<restarts>`, or None where the name has none."""
    name = AttemptName(attempt)
    return None if name.job is None else f"{name.job}.{name.restart}"


def copy_folder(run: Path, start: str, node: str) -> Path:
    """Return the folder for copies of `run` on `node` during a start of its job."""
    of_run = hashlib.sha256(str(run).encode()).hexdigest()[:12]
    return MEMORY / f"{PREFIX}{os.getuid()}-{start}-{of_run}-{node}"


def make_copy_folder(folder: Path, run: Path) -> None:
    """Make the folder for copies of `run`, unless it is there. OSError where it is not this user's alone."""
    folder.mkdir(mode=0o700, exist_ok=True)
    if not is_private(folder):
        raise PermissionError(f"{folder} belongs to somebody else, or others can enter it")
    # Never half of it: ranks of other runs read it to tell who still needs these copies.
    write_atomic(folder / _RUN, str(run))


def remove_stale_copies() -> None:
    """Remove this user's copies on this machine whose run is over, or is held by another start of a job by now.

    Jobs that were killed have left them. The ranks of a run that is held, as by its batch script, may call this.
    """
    for folder in MEMORY.glob(f"{PREFIX}{os.getuid()}-*"):
        if is_private(folder) and _is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _is_stale(folder: Path) -> bool:
    """Return whether nobody will go on from the copies in a folder. Where that is not known it is False."""
    name = _NAME.fullmatch(folder.name)
    try:
        owner = lease.holder(RunPaths(Path((folder / _RUN).read_text(encoding="utf-8"))))
    except (OSError, ValueError):
        return False
    if name is None or (owner is not None and owner.attempt == _UNKNOWN):
        return False
    return owner is None or start_of(owner.attempt) != name["start"]
