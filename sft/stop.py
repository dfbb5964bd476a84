"""A request to stop, as a flag: set by a signal, acted on by all ranks at the next step boundary.

Slurm sends USR2 before the time limit and TERM on cancel and preemption. Nothing is saved inside a signal handler:
a sharded save needs every rank, and a handler runs at an arbitrary point of the step.
"""

from __future__ import annotations

import signal
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
