"""Local runs as processes: is this one still the one that was started, and how to end it.

A process id alone is reused; with the start time the kernel keeps (clock ticks since boot) it is not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time

from launcher.contract.manifest import Attempt
from launcher.contract.processes import start_ticks

_TERM_SECONDS = 60.0
_KILL_SECONDS = 10.0


def is_here(attempt: Attempt) -> bool:
    """Whether the attempt's process would be on this machine."""
    return attempt.host == socket.gethostname()


def is_alive(attempt: Attempt) -> bool:
    """Whether the attempt's own process runs on this machine."""
    return start_ticks(int(attempt.job_id)) == attempt.process_start and attempt.process_start is not None


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
