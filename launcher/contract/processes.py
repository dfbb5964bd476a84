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


def state(pid: int) -> str:
    """Return the kernel's word for what a process is doing, e.g. `S (sleeping)`, or `gone` where there is none."""
    return _status(pid, "State") or "gone"


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler for the signal `number`, which would end it otherwise."""
    mask = _status(pid, "SigCgt")
    return bool(mask) and bool(int(mask, 16) >> (number - 1) & 1)


def environment(pid: int) -> dict[str, str]:
    """Return the environment that a process was started with, or an empty one where it cannot be read."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return {}
    pairs = (entry.partition(b"=") for entry in entries if b"=" in entry)
    return {os.fsdecode(name): os.fsdecode(value) for name, _, value in pairs}


def _status(pid: int, field: str) -> str:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(f"{field}:"):
                return line.partition(":")[2].strip()
    return ""


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
    return session(pid) == pid


def session(pid: int) -> int | None:
    """Return the id of the session that a process is in, which is that of its first process, or None if it is gone."""
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def parent(pid: int) -> int | None:
    """Return the id of a process's parent, or None if it is gone."""
    word = _status(pid, "PPid")
    return int(word) if word else None
