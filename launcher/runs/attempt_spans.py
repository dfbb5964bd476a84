"""When each attempt of a run began and ended, why, and how much of its time went into nothing, by the run's own events.

Time is kept once a complete checkpoint, or the end of training, follows it: the next attempt goes on from there. What
came after the last of these is wasted, unless the attempt succeeded or still runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import AttemptName
from launcher.contract.job_state import JobState
from launcher.contract.records import is_number

_KEEPS = ("checkpoint_saved", "training_finished", "exported")
"""Events behind which nothing before them is lost."""
_BREAKS = ("training_started", "rewound")
"""Events at which training goes back to what was kept; the first start of an attempt is none."""
_STATES = {
    "done": JobState.COMPLETED,
    "preempted": JobState.PREEMPTED,
    "timeout": JobState.TIMEOUT,
    "cancelled": JobState.CANCELLED,
    "node_failure": JobState.NODE_FAIL,
    "out_of_memory": JobState.OUT_OF_MEMORY,
}
"""Causes that say more than the exit code does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """One attempt."""

    attempt: str
    job: str
    """Id of its job."""
    cluster: str
    began: float
    """Seconds since the epoch."""
    ended: float | None
    """None where it has recorded no end: it runs, or died without a word."""
    last: float
    """Time of its last event."""
    exit_code: int | None
    cause: str
    """Why it ended, as `restart_decided` says; empty where nothing was decided."""
    kept: tuple[float, ...]
    """When something was kept."""
    broken: tuple[float, ...]
    """When training went back to what was kept."""

    @property
    def state(self) -> JobState:
        """How it ended, UNKNOWN where no end is recorded."""
        if self.ended is None:
            return JobState.UNKNOWN
        if self.exit_code == ExitCode.OK:
            return JobState.COMPLETED
        return _STATES.get(self.cause, JobState.INTERRUPTED if self.exit_code == ExitCode.REQUEUE else JobState.FAILED)

    def wasted(self, end: float, *, running: bool) -> float:
        """Return the seconds up to `end` whose work was lost."""
        kept, lost = self.began, 0.0
        marks = [(time, False) for time in self.kept] + [(time, True) for time in self.broken]
        for time, is_break in sorted(marks):
            lost += time - kept if is_break else 0.0
            kept = time
        fine = running or self.exit_code == ExitCode.OK
        return lost if fine else lost + max(0.0, end - kept)


def spans(events: Sequence[Mapping[str, Any]]) -> list[Span]:
    """Return the attempts that have started, oldest first."""
    starts = {
        str(event["attempt"]): event
        for event in reversed(events)
        if event["event"] == "attempt_started" and isinstance(event.get("attempt"), str)
    }
    own = {name: [event for event in events if event.get("attempt") == name] for name in starts}
    found = [_span(name, starts[name], own[name]) for name in starts]
    return sorted(found, key=lambda span: span.began)


def _span(name: str, start: Mapping[str, Any], own: Sequence[Mapping[str, Any]]) -> Span:
    end, decided = _last(own, "attempt_ended"), _last(own, "restart_decided")
    code = end.get("exit_code", decided.get("exit_code"))
    breaks = [event["time"] for event in own if event["event"] in _BREAKS]
    trained = min((event["time"] for event in own if event["event"] == "training_started"), default=None)
    return Span(
        attempt=name,
        job=str(start.get("job_id") or AttemptName(name).job or ""),
        cluster=str(start.get("cluster") or ""),
        began=start["time"],
        ended=end["time"] if is_number(end.get("time")) else None,
        last=max(event["time"] for event in own if event["event"] != "restart_decided" or not end),
        exit_code=code if type(code) is int else None,
        cause=str(decided.get("cause", "")),
        kept=tuple(event["time"] for event in own if event["event"] in _KEEPS),
        broken=tuple(time for time in breaks if time != trained),
    )


def _last(events: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((event for event in reversed(events) if event["event"] == name), {})
