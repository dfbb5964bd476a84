"""Report how long the first step took to come, phase by phase: a log line, an event, and a number in progress.json."""

from __future__ import annotations

import time
from pathlib import Path
from types import ModuleType

import torch

from launcher.contract.records import read_events
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.runtime.start_clock import StartClock

_SHORTEST = 0.05
"""Seconds of the shortest phase that the log line names."""


class StartupCallback(pl.Callback):
    """The first callback: ends the last phases of the clock, and reports all of them after the second step.

    What the first step takes longer than the second is warm-up: kernels are compiled, communicators made.
    """

    def __init__(self, clock: StartClock, log: RunLog, attempt: str) -> None:
        self._clock = clock
        self._log = log
        self._attempt = attempt
        self._first_step = 0
        self._began = 0.0
        self._seconds: list[float] = []
        """Of the first two steps."""
        self._phases: dict[str, float] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock.end("start of the loop")

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if not self._seconds:
            self._clock.end("evaluation and first batch")
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if len(self._seconds) == 2:
            return
        if pl_module.device.type == "cuda":  # the host waits for the device twice in an attempt, for true times
            torch.cuda.synchronize()
        self._seconds.append(time.perf_counter() - self._began)
        if len(self._seconds) == 1:
            self._first_step = trainer.global_step
            self._clock.end("first step")
            phases = self._clock.with_queue(read_events(self._log.paths), self._attempt)
            self._phases = {name: round(seconds, 3) for name, seconds in phases.items()}
            self._log.first_step_after(sum(self._phases.values()))
        if len(self._seconds) == 2 or trainer.global_step == self._log.max_steps:
            self._report()

    def _report(self) -> None:
        total = round(sum(self._phases.values()), 3)
        first, *later = self._seconds
        warm_up = {"warm_up": round(max(0.0, first - later[0]), 3)} if later else {}
        self._log.event("first_step", step=self._first_step, seconds=total, phases=self._phases, **warm_up)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._phases.items() if seconds >= _SHORTEST)
        more = f" ({warm_up['warm_up']:.1f} more than the second)" if later else ""
        self._log.say(f"first step done {total:.1f} s after submission: {parts}{more}")
        if lacks_bytecode(torch):
            packages = Path(torch.__file__).parent.parent
            self._log.say(
                f"each process compiles the Python modules that it imports, since {packages} has no bytecode: unset "
                f"PYTHONDONTWRITEBYTECODE where it is set, or run python -m compileall -q {packages} once"
            )


def lacks_bytecode(module: ModuleType) -> bool:
    """Return whether Python has not found or kept bytecode of a module that it imported from source."""
    cached = None if module.__spec__ is None else module.__spec__.cached
    return cached is not None and not Path(cached).is_file()
