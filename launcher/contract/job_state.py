"""The states of a job that we show, whatever scheduler it has.

A state says two things that callers act on: whether the job may still run (`active`), and whether it is over for good
(`terminal`). UNKNOWN is neither.
"""

from __future__ import annotations

from enum import StrEnum


class JobState(StrEnum):
    """State of a run's newest job."""

    PENDING = "PENDING"
    HELD = "HELD"
    """Waits for a person to release it."""
    REQUEUED = "REQUEUED"
    RUNNING = "RUNNING"
    SUSPENDED = "SUSPENDED"
    COMPLETING = "COMPLETING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    INTERRUPTED = "INTERRUPTED"
    """Stopped on request with a complete checkpoint (exit code 75)."""
    TIMEOUT = "TIMEOUT"
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    NODE_FAIL = "NODE_FAIL"
    PREEMPTED = "PREEMPTED"
    UNKNOWN = "UNKNOWN"
    """Nobody who would know has answered."""

    @property
    def active(self) -> bool:
        """The job holds or waits for resources: a second one would write to the same files."""
        return self in _ACTIVE

    @property
    def terminal(self) -> bool:
        """The job will not run again by itself."""
        return self not in _ACTIVE and self is not JobState.UNKNOWN


_ACTIVE = frozenset(
    {
        JobState.PENDING,
        JobState.HELD,
        JobState.REQUEUED,
        JobState.RUNNING,
        JobState.SUSPENDED,
        JobState.COMPLETING,
    }
)
