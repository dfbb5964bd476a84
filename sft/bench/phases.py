"""Time the phases of a step: waiting for data, forward, backward, gradient reduction, update.

Megatron-core's schedules call timers where a phase begins and ends. These record events in the device's stream and read
them after the last step, so the measurement makes nothing wait. With overlapped communication a phase includes what it
waits for, not what runs beside it.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch

_PHASES = {
    "forward-compute": "forward",
    "backward-compute": "backward",
    "all-grads-sync": "gradient reduction",
    "non-tensor-parallel-grads-all-reduce": "gradient reduction",
    "embedding-grads-all-reduce": "gradient reduction",
    "optimizer": "optimizer",
    "step": "step",
}


class _Mark:
    """A point in time: on the device's stream where there is a GPU, else on the host's clock."""

    def __init__(self) -> None:
        self._event: torch.cuda.Event | None = None
        self._time = 0.0
        if torch.cuda.is_available():
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._time = time.perf_counter()

    def milliseconds_to(self, later: _Mark) -> float:
        """Return the time from this mark to a later one, after the device has reached both."""
        if self._event is not None and later._event is not None:
            return float(self._event.elapsed_time(later._event))
        return (later._time - self._time) * 1e3


class _Span:
    """One named timer, with `start` and `stop` as Megatron-core calls them."""

    def __init__(self) -> None:
        self.marks: list[_Mark] = []

    def start(self, barrier: bool = False) -> None:
        self.marks.append(_Mark())

    def stop(self, barrier: bool = False) -> None:
        self.marks.append(_Mark())


class PhaseTimers:
    """Takes the place of Megatron-core's timers (`config.timers`)."""

    def __init__(self) -> None:
        self._spans: dict[str, _Span] = {}

    def __call__(self, name: str, log_level: int = 0) -> _Span:
        return self._spans.setdefault(name, _Span())

    def reset(self) -> None:
        """Forget what was measured."""
        self._spans.clear()

    def milliseconds(self, steps: int, whole: float) -> dict[str, float]:
        """Return the milliseconds of each phase in a mean step of `steps`, which takes `whole` milliseconds.

        `other` is the time in a step that belongs to no phase. `data` is the time between two steps: waiting for data,
        copying them to the device, and the trainer's loop.
        """
        phases: defaultdict[str, float] = defaultdict(float)
        for name, span in self._spans.items():
            if name in _PHASES:
                pairs = zip(span.marks[::2], span.marks[1::2], strict=True)
                phases[_PHASES[name]] += sum(begin.milliseconds_to(end) for begin, end in pairs) / steps
        step = phases.pop("step", 0.0)
        phases["other"] = step - sum(phases.values())
        phases["data"] = whole - step
        return {name: round(value, 2) for name, value in phases.items()}
