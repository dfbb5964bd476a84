"""Measure what passes between the submission of a run and the end of its first step, phase by phase.

The batch script says when it began, when it began to prepare and when it began to start ranks; the rest is measured on
rank 0. Phases follow each other without gaps, so that they add up to the whole.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence

from launcher.contract.processes import start_ticks
from launcher.contract.records import is_number
from launcher.contract.rundir import JsonObject

_SCRIPT = "script"
_OF_SCRIPT = {
    "SFT_BEGAN_SCRIPT": _SCRIPT,
    "SFT_BEGAN_PREPARE": "prepare",
    "SFT_BEGAN_PREFLIGHT": "preflight",
    "SFT_BEGAN_RANKS": "start of ranks",
}
"""The phases of the batch script, in their order, by the variables that hold when they began, in seconds since the
epoch. The last one ends when Python has started."""
QUEUE = "queue"
"""From the submission, or the end of the attempt before, to the begin of the batch script."""


class StartClock:
    """Ends one phase after the other; each begins where the one before it ended."""

    def __init__(self, began: float | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._last = clock() if began is None else began
        self.phases: dict[str, float] = {}
        """Seconds of each phase, in their order."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> StartClock:
        """Return a clock that has seen the phases of the batch script, if one has started this process, and Python's.

        Its next phase begins when this process began.
        """
        began = {name: float(environ[key]) for key, name in _OF_SCRIPT.items() if key in environ}
        # A script that runs again in the same shell may do less than the first time.
        began = {name: at for name, at in began.items() if at >= began.get(_SCRIPT, at)}
        edges = [*began.values(), process_began()]
        made = cls(edges[0])
        for name, end in zip(began, edges[1:], strict=True):
            made.end(name, at=end)
        return made

    def end(self, phase: str, *, at: float | None = None) -> None:
        """Add the time since the last phase ended to `phase`."""
        now = self._clock() if at is None else at
        # Never less than 0: the script may run on another node, whose clock may differ.
        self.phases[phase] = self.phases.get(phase, 0.0) + max(0.0, now - self._last)
        self._last = max(now, self._last)

    def with_queue(self, events: Sequence[JsonObject], attempt: str) -> dict[str, float]:
        """Return all phases, that in the queue first: from the last submission, or end of an attempt, to the script.

        Without a batch script nothing has waited.
        """
        if _SCRIPT not in self.phases:
            return dict(self.phases)
        began = self._last - sum(self.phases.values())
        before = [
            float(event["time"])
            for event in events
            if event.get("event") in ("submitted", "attempt_ended") and event.get("attempt") != attempt
        ]
        waited = began - max((at for at in before if is_number(at)), default=began)
        return {QUEUE: max(0.0, waited), **self.phases}


def process_began() -> float:
    """Return when this process began, in seconds since the epoch, to a hundredth of a second."""
    ticks = start_ticks(os.getpid())
    if ticks is None:
        return time.time()
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - max(0.0, age)
