"""A request to stop, as a flag: set by a signal or by the clock, acted on by all ranks at the next step boundary.

Slurm sends USR2 before the time limit and TERM on cancel and preemption. Should the signal not come, or a save take
longer than the notice, the ranks still stop in time: they know when the job ends and how long steps and saves take.
Nothing is saved inside a signal handler:
a sharded save needs every rank, and a handler runs at an arbitrary point of the step.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Mapping
from types import FrameType


class StopFlag:
    """Remembers that SIGUSR2 or SIGTERM came, and which."""

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Register the handlers in place of whatever is there.

        To be called again once Lightning's trainer runs: it puts a handler of its own before ours, which makes a
        collective call inside the signal handler and so hangs the ranks that were not signalled at the same point.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name


class Deadline:
    """Whether another step and a save still fit into the job's time, by what they have taken so far.

    The time of a step is the longest of the last ones, evaluations included; the first is not counted, since kernels
    are compiled and caches filled in it. Until a save was measured it is taken to need the notice that the config asks
    for (resources.signal_seconds), which is what the user expects it to need.
    """

    MARGIN_SECONDS = 15.0
    """For ending the ranks and starting the job again."""

    def __init__(self, end: float | None, notice_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.end = end
        self._clock = clock
        self._save_seconds = notice_seconds
        self._saved = False
        self._steps: deque[float] = deque(maxlen=50)
        self._ready_at: float | None = None

    @classmethod
    def from_environ(cls, notice_seconds: float, environ: Mapping[str, str] = os.environ) -> Deadline:
        """The end of the job as the batch script has it (SFT_END_TIME, seconds since the epoch); none without it."""
        text = environ.get("SFT_END_TIME", "")
        return cls(float(text) if text.isdigit() else None, notice_seconds)

    @property
    def needed(self) -> float:
        """Seconds that one more step, a save and the end take."""
        return max(self._steps, default=0.0) + self._save_seconds + self.MARGIN_SECONDS

    def step_begins(self) -> None:
        """All work of a step boundary is done."""
        self._ready_at = self._clock()

    def step_ended(self) -> None:
        """A boundary is reached."""
        if self._ready_at is not None:
            self._steps.append(self._clock() - self._ready_at)

    def saved(self, seconds: float) -> None:
        """A save took this long; the longest counts."""
        self._save_seconds = max(self._save_seconds, seconds) if self._saved else seconds
        self._saved = True

    @property
    def is_due(self) -> bool:
        """Whether now is the last moment to stop."""
        return self.end is not None and self._clock() + self.needed >= self.end
