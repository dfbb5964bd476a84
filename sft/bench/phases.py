"""Milliseconds of a step by phase: waiting for data, forward, backward, gradient reduction, update.

Megatron-core's schedules call timers where a phase begins and ends. Ours write events into the device's stream there
and read them when all is over, so that nothing waits while it is measured. With overlapped communication a phase
holds what it waits for, not what runs behind it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

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


class _Span:
    """One named timer: `start` and `stop` as Megatron-core calls them."""

    def __init__(self, mark: Callable[[], Any]) -> None:
        self._mark = mark
        self.marks: list[Any] = []

    def start(self, barrier: bool = False) -> None:
        self.marks.append(self._mark())

    def stop(self, barrier: bool = False) -> None:
        self.marks.append(self._mark())


class PhaseTimers:
    """What stands in for Megatron-core's timers (`config.timers`)."""

    def __init__(self) -> None:
        self._spans: dict[str, _Span] = {}
        self._device = torch.cuda.is_available()

    def __call__(self, name: str, log_level: int = 0) -> _Span:
        return self._spans.setdefault(name, _Span(self._event if self._device else time.perf_counter))

    def reset(self) -> None:
        """Forget what was measured."""
        self._spans.clear()

    def milliseconds(self, steps: int, whole: float) -> dict[str, float]:
        """Of each phase, a step, which takes `whole` milliseconds in all.

        `other` is what belongs to no phase of the step, `data` what is between one step and the next: waiting for
        data, copying it to the device, the trainer's loop.
        """
        found: defaultdict[str, float] = defaultdict(float)
        for name, span in self._spans.items():
            if name in _PHASES:
                pairs = zip(span.marks[::2], span.marks[1::2], strict=True)
                found[_PHASES[name]] += sum(self._elapsed(*pair) for pair in pairs) / steps
        step = found.pop("step", 0.0)
        found["other"] = step - sum(found.values())
        found["data"] = whole - step
        return {name: round(value, 2) for name, value in found.items()}

    @staticmethod
    def _event() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _elapsed(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) if self._device else (end - begin) * 1e3
