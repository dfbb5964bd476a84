"""Processes of this machine: is this one still the one that was started?

A process id alone is reused; with the start time the kernel keeps (clock ticks since boot) it is not.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return None if fields[0] == "Z" else int(fields[19])


def with_text(text: str) -> list[int]:
    """Our processes on this machine that carry `text` in their arguments or their environment, besides this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            seen = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
        except OSError:  # gone, or not ours
            continue
        if text.encode() in seen and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return sorted(found)


def is_session_leader(pid: int) -> bool:
    """Whether the process leads a session of its own, as the controller of a local run does."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid) == pid
    return False
