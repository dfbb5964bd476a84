"""Stop in time by the clock, in case the signal before the time limit does not come or leaves too little time."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping


class Deadline:
    """Tells whether another step and a save still fit into the job's time, by what they have taken so far.

    A step is expected to take as long as the longest of the last 50, evaluations included. A save is expected to take
    as long as the longest so far, and before the first one as long as `notice_seconds` (resources.signal_seconds), the
    time that the user leaves for it.
    """

    MARGIN_SECONDS = 15.0
    """For ending the ranks and requeueing the job."""

    def __init__(self, end: float | None, notice_seconds: float, clock: Callable[[], float] = time.time) -> None:
        self.end = end
        self._clock = clock
        self._save_seconds = notice_seconds
        self._saved = False
        self._steps: deque[float] = deque(maxlen=50)
        # None until the first step has ended, which is not measured: it compiles kernels and fills caches.
        self._ready_at: float | None = None

    @classmethod
    def from_environ(cls, notice_seconds: float, environ: Mapping[str, str] = os.environ) -> Deadline:
        """Read the end of the job from SFT_END_TIME, in seconds since the epoch. Without it there is no deadline."""
        text = environ.get("SFT_END_TIME", "")
        return cls(float(text) if text.isdigit() else None, notice_seconds)

    @property
    def needed(self) -> float:
        """Seconds for one more step, a save and the end of the attempt."""
        return max(self._steps, default=0.0) + self._save_seconds + self.MARGIN_SECONDS

    def step_begins(self) -> None:
        """Start the clock of a step, once all work at the step boundary is done."""
        self._ready_at = self._clock()

    def step_ended(self) -> None:
        """Stop the clock of a step."""
        if self._ready_at is not None:
            self._steps.append(self._clock() - self._ready_at)

    def saved(self, seconds: float) -> None:
        """Record how long a save took."""
        self._save_seconds = max(self._save_seconds, seconds) if self._saved else seconds
        self._saved = True

    @property
    def is_due(self) -> bool:
        """Whether now is the last moment to stop."""
        return self.end is not None and self._clock() + self.needed >= self.end
