"""Identify processes of this machine.

A process id is reused. Together with its start time (clock ticks since boot) it names one process for good.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot, or None if it does not run."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may contain spaces and brackets
    return None if fields[0] == "Z" else int(fields[19])


def with_text(text: str) -> list[int]:
    """Return the ids of this user's other processes that have `text` in their arguments or environment."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            seen = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:  # gone, or not ours
            continue
        if text.encode() in seen and int(folder.name) != os.getpid():
            pids.append(int(folder.name))
    return sorted(pids)


def is_session_leader(pid: int) -> bool:
    """Return whether a process leads a session of its own, as the controller of a local run does."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False
