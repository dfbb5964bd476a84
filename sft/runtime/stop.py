"""A request to stop, as a flag that a signal sets and that all ranks act on at the next step boundary.

Slurm sends USR2 before the time limit, and TERM on cancel and preemption.
"""

from __future__ import annotations

import signal
from types import FrameType


class StopFlag:
    """Remembers that SIGUSR2 or SIGTERM came, and which.

    The handler saves nothing: a sharded save needs every rank, and a handler runs at an arbitrary point of the step.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None

    def install(self) -> None:
        """Register the handlers in place of whatever is there.

        Call it again once Lightning's trainer runs: Lightning puts a handler of its own before ours. That one makes a
        collective call inside the handler, so ranks that get the signal at different points of a step would hang.
        """
        for number in (signal.SIGUSR2, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def __bool__(self) -> bool:
        return self.signal_name is not None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
