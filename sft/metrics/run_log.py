"""Write what a run reports while it trains: log lines, metrics.jsonl, events.jsonl and progress.json.

The numbers of a step stay on the device until a line is due: logging every n-th step makes the host wait for the device
only every n-th step. Log lines are also the progress bar, because logs are files, where a bar redrawn in place would be
one long line.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import NotRequired, TypedDict

import torch

from launcher.contract.prometheus_file import Standing, newest_losses, write_prometheus
from launcher.contract.records import read_events, read_metrics
from launcher.contract.restart_cost import restart_cost
from launcher.contract.rundir import (
    JsonObject,
    RunPaths,
    append_event,
    append_line,
    record_in,
    write_atomic,
    write_json,
)
from launcher.contract.spec import RunSpec
from sft.engine.results import StepResult
from sft.engine.routing import AUX_LOSS, NUMBERS
from sft.metrics.loggers import MetricLoggers
from sft.metrics.mfu import Utilization

_PROGRESS_INTERVAL_SECONDS = 2.0
"""progress.json goes to a shared file system, where each write costs something and nobody reads more often."""
_DASHBOARD_INTERVAL_SECONDS = 15.0
"""Prometheus asks no more often, and the file is made from all that the run has written."""
_CONFIRM_SECONDS = 1.0
"""Age of the last look at the lease with which a line may be written. A look reads a small file."""
_BAR_WIDTH = 20
_NAMED_GAPS = 3
"""Number of gaps in metrics.jsonl that a line names; one is the rule, and a garbled file can have hundreds."""


class _Speed(TypedDict):
    tokens_per_second: float
    mfu: NotRequired[float]


class _Record(_Speed):
    """The numbers of a step that progress.json and the log line have of a line of metrics.jsonl."""

    step: int
    loss: float
    grad_norm: float
    lr: float
    consumed_examples: int


class RunLog:
    """Log lines, metrics and progress of a run. Only rank 0 writes."""

    def __init__(
        self,
        paths: RunPaths,
        spec: RunSpec,
        *,
        attempt: str,
        max_steps: int,
        is_writer: bool,
        utilization: Utilization | None = None,
        may_write: Callable[[float], None] | None = None,
    ) -> None:
        """Log to `paths`, where `is_writer` says that this rank is the one that does.

        `may_write(seconds)` raises where the rank may no longer write, by a check that is at most so many seconds old.
        """
        self.paths = paths
        self.max_steps = max_steps
        self.is_writer = is_writer
        self._spec = spec
        self._attempt = attempt
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._last_written = 0.0
        self._dashboard_due = 0.0 if spec.prometheus_file is not None and is_writer else float("inf")
        self._checkpoint: str | None = None
        self._record: dict[str, object] = {}
        self._utilization = utilization
        self._may_write = may_write
        self._loggers: MetricLoggers | None = None
        self._held_out: dict[str, float] = {}
        self._tokens = 0
        self._squared_lengths = 0
        self._seconds = 0.0
        self._began = time.monotonic()
        self._first_step: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Seconds since training began."""
        return time.monotonic() - self._began

    def begin(self, step: int, source: str) -> None:
        """Note that training begins after `step` steps, from `source`, and remove what is written of later steps."""
        self._began = time.monotonic()
        if self.is_writer:
            self._confirm(0.0)
            # An earlier attempt may have gone further than its last checkpoint: those steps are done again now. At the
            # start so is the evaluation before the first one.
            done = step or -1
            for path in (self.paths.generations, self.paths.bad_steps):
                _drop_later(path, done)
            kept = [record for record in read_metrics(self.paths) if record["step"] <= done]
            self._tell_of_lost_metrics(kept, step)
            self._held_out = newest_losses(kept)
            lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
            write_atomic(self.paths.metrics, "".join(lines))
            self._loggers = MetricLoggers(self._spec, self.paths, step, self.say)
        self.say(f"resuming after step {step} from {source}" if step else f"starting from {source}")
        self.event("training_started", step=step, max_steps=self.max_steps)
        cost = restart_cost(read_events(self.paths), step, time.time()) if self.is_writer else None
        if cost is not None:
            self.event("restarted_in_place", **cost)

    def _tell_of_lost_metrics(self, kept: list[JsonObject], step: int) -> None:
        """Say where metrics.jsonl has no lines for steps before `step`, which curves will lack from now on."""
        every = self._spec.logging.every
        begun = (event.get("step") for event in read_events(self.paths) if event["event"] == "training_started")
        first_step = next((at for at in begun if type(at) is int), step)  # not 0 in a run that goes on with another one
        logged = [first_step, *sorted({record["step"] for record in kept if "loss" in record}), step]
        gaps = [(first, last) for first, last in pairwise(logged) if last - first > every]
        if gaps:
            where = ", ".join(f"{first + 1} to {last}" for first, last in gaps[:_NAMED_GAPS])
            more = f" and {len(gaps) - _NAMED_GAPS} more gaps" if len(gaps) > _NAMED_GAPS else ""
            self.say(f"{self.paths.metrics} has no line for steps {where}{more}: it was damaged, emptied or removed")
            self.event("metrics_lost", steps=[list(gap) for gap in gaps[:_NAMED_GAPS]], gaps=len(gaps))

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self.is_writer:
            print(text, flush=True)

    def event(self, name: str, **fields: object) -> None:
        """Append an event to events.jsonl on rank 0."""
        if self.is_writer:
            append_event(self.paths, name, attempt=self._attempt, **fields)

    def metrics(self, **fields: object) -> None:
        """Append a line to metrics.jsonl on rank 0, and pass its numbers to the loggers."""
        if self.is_writer:
            self._confirm(_CONFIRM_SECONDS)
            append_line(self.paths.metrics, fields)
            self._held_out |= newest_losses([fields])
            if self._loggers is not None:
                self._loggers.log(fields)

    def close(self) -> None:
        """Close the loggers. Nothing may be logged after this."""
        if self._loggers is not None:
            self._loggers.close()

    def first_step_after(self, seconds: float) -> None:
        """Show in progress.json from now on how long after the submission the first step was done."""
        self._first_step = {"first_step_seconds": round(seconds, 3)}

    def checkpoint_saved(self, name: str) -> None:
        """Show `name` as the newest checkpoint in progress.json from now on."""
        self._checkpoint = name
        if self.is_writer and self._record:
            self._write_progress()

    def is_due(self, step: int) -> bool:
        """Return whether the step gets a log line."""
        return self._spec.logging.is_due(step, self.max_steps)

    def step(self, result: StepResult, seconds: float, consumed_examples: int) -> None:
        """Log one optimizer step that took `seconds`."""
        self._step_seconds.append(seconds)
        self._tokens += result.tokens
        self._squared_lengths += result.squared_lengths
        self._seconds += seconds
        if not self.is_writer or not self.is_due(result.step):
            return
        loss, grad_norm, routing = _read(result)
        record: _Record = {
            "step": result.step,
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": result.lr,
            **self._speed(),
            "consumed_examples": consumed_examples,
        }
        counts = {
            "examples": result.examples,
            "tokens": result.tokens,
            "supervised_tokens": result.supervised_tokens,
        }
        if not self._spec.train.router_aux_loss:
            routing.pop(AUX_LOSS, None)
        self.metrics(**record, **counts, **routing)
        # By the median of the last steps: one step that saved a checkpoint should not change the estimate.
        eta = (self.max_steps - result.step) * sorted(self._step_seconds)[len(self._step_seconds) // 2]
        self._record = {**record, "eta_seconds": round(eta, 1)}
        if self._spec.logging.progress_bar:
            self.say(_progress_line(record, self.max_steps, eta))
        if result.step == self.max_steps or time.time() - self._last_written >= _PROGRESS_INTERVAL_SECONDS:
            self._write_progress()

    def _speed(self) -> _Speed:
        """Return the tokens per second, and MFU if it has a meaning, since the last line, and start counting anew."""
        seconds = max(self._seconds, 1e-9)
        speed: _Speed = {"tokens_per_second": round(self._tokens / seconds, 1)}
        if self._utilization is not None:
            speed["mfu"] = round(self._utilization.of(self._tokens, self._squared_lengths, seconds), 4)
        self._tokens, self._squared_lengths, self._seconds = 0, 0, 0.0
        return speed

    def _confirm(self, max_age: float) -> None:
        if self._may_write is not None:
            self._may_write(max_age)

    def _write_progress(self) -> None:
        self._confirm(_CONFIRM_SECONDS)
        self._last_written = time.time()
        head = {"attempt": self._attempt, "max_steps": self.max_steps, **self._first_step}
        tail = {"checkpoint": self._checkpoint, "time": self._last_written}
        write_json(self.paths.progress, {**head, **self._record, **tail})
        if self._last_written >= self._dashboard_due or self._record.get("step") == self.max_steps:
            self._write_dashboard()

    def _write_dashboard(self) -> None:
        """Replace the file of metrics.prometheus. A disk that is full or away only costs the site its numbers."""
        if self._dashboard_due == float("inf"):
            return
        self._dashboard_due = self._last_written + _DASHBOARD_INTERVAL_SECONDS
        standing = Standing(attempt=self._attempt, active=True, held_out=self._held_out)
        try:
            write_prometheus(self._spec, self.paths, standing)
        except OSError as error:
            self._dashboard_due = float("inf")
            self.say(f"metrics.prometheus: {error}; the file is no longer written")


def _drop_later(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, and those that a crash has torn."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        lines = list(file)
    steps = [None if (record := record_in(line)) is None else record.get("step") for line in lines]
    kept = [line for line, at in zip(lines, steps, strict=True) if isinstance(at, int) and at <= step]
    if len(kept) < len(lines):
        write_atomic(path, "".join(kept))


def _read(result: StepResult) -> tuple[float, float, dict[str, float]]:
    """Return the loss, the gradient norm and how experts were used, by one transfer from the device."""
    routing = [] if result.routing is None else list(result.routing.unbind())
    loss, grad_norm, *numbers = torch.stack(
        [number.double() for number in (result.loss, result.grad_norm, *routing)]
    ).tolist()
    return loss, grad_norm, dict(zip(NUMBERS, numbers, strict=bool(routing)))


def _progress_line(record: _Record, max_steps: int, eta: float) -> str:
    done = record["step"] * _BAR_WIDTH // max_steps
    minutes, seconds = divmod(int(eta), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    mfu = f"  MFU {record['mfu']:.1%}" if "mfu" in record else ""
    return (
        f"step {record['step']:>{len(str(max_steps))}}/{max_steps} [{'#' * done}{'.' * (_BAR_WIDTH - done)}] "
        f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s{mfu}  ETA {clock}"
    )
