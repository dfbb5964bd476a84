"""`launcher wait`: block until runs have ended."""

from __future__ import annotations

import time
from collections.abc import Sequence

from launcher.contract.errors import SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.state import RunStatus, collect

_SECONDS = 5.0
_PATIENCE = 12  # looks in a row at which every state may be unknown


def wait(runs: Sequence[RunPaths], timeout: float | None = None, interval: float = _SECONDS) -> list[RunStatus] | None:
    """Return the status of all runs once each has ended for good, or None if `timeout` seconds were not enough.

    Raise SchedulerError if the state of every run that is left stays unknown: it would wait for ever.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    unknown_looks = 0
    while True:
        rows, problem = collect(runs)
        waiting = [row for row in rows if not row.state.terminal]
        if not waiting:
            return rows
        unknown_looks = unknown_looks + 1 if all(row.state is JobState.UNKNOWN for row in waiting) else 0
        if unknown_looks >= _PATIENCE:
            raise SchedulerError(problem or "\n".join(f"run {row.run} is UNKNOWN: {row.reason}" for row in waiting))
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        time.sleep(interval if left is None else min(interval, left))
