"""Local runs as processes: is this one still the one that was started, and how to end it.

A process id alone is reused; with the start time the kernel keeps (clock ticks since boot) it is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from pathlib import Path

from launcher.submission.manifest import Attempt

_TERM_SECONDS = 60.0
_KILL_SECONDS = 10.0


def start_ticks(pid: int) -> int | None:
    """When the process started, in clock ticks since boot; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the command's name may hold spaces and brackets
    return None if fields[0] == "Z" else int(fields[19])


def is_here(attempt: Attempt) -> bool:
    """Whether the attempt's process would be on this machine."""
    return attempt.host == socket.gethostname()


def is_alive(attempt: Attempt) -> bool:
    """Whether the attempt's own process runs on this machine."""
    return start_ticks(int(attempt.job_id)) == attempt.process_start and attempt.process_start is not None


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


def end(attempt: Attempt, grace: float = _TERM_SECONDS) -> None:
    """TERM to the controller, which hands it down to the ranks once; KILL to the whole session after `grace`."""
    pid = int(attempt.job_id)
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, _KILL_SECONDS)):
        if not is_alive(attempt):
            return
        with contextlib.suppress(ProcessLookupError):
            if number is signal.SIGTERM:
                os.kill(pid, number)
            else:
                os.killpg(pid, number)
        deadline = time.monotonic() + patience
        while is_alive(attempt) and time.monotonic() < deadline:
            time.sleep(0.05)
