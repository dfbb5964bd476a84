"""What happens between steps: progress, evaluation, checkpoints and the request to stop."""

from __future__ import annotations

import shutil
import time
from collections import deque
from typing import Any, cast

import pytorch_lightning as pl

from launcher.rundir import RunPaths, append_event, append_line, write_json
from launcher.spec import RunSpec
from sft.data.datamodule import StepBatches
from sft.megatron.distributed import ControlGroup
from sft.module import SFTGPT, StepResult
from sft.stop import StopFlag
from sft.strategy import MegatronStrategy

_PROGRESS_INTERVAL_SECONDS = 2.0
"""progress.json is synced to a shared file system; more often would only cost."""
_BAR_WIDTH = 20


class RunLog:
    """The log lines, metrics and progress of a run; only rank 0 writes."""

    def __init__(self, paths: RunPaths, spec: RunSpec, *, attempt: str, max_steps: int, is_writer: bool) -> None:
        self._paths = paths
        self._spec = spec
        self._attempt = attempt
        self._max_steps = max_steps
        self._is_writer = is_writer
        self._step_seconds: deque[float] = deque(maxlen=20)
        self._last_written = 0.0
        self._checkpoint: str | None = None
        self._record: dict[str, Any] = {}
        self._tokens = 0
        self._seconds = 0.0

    def say(self, text: str) -> None:
        """Print a line on rank 0."""
        if self._is_writer:
            print(text, flush=True)

    def event(self, name: str, **fields: Any) -> None:
        """Record an event on rank 0."""
        if self._is_writer:
            append_event(self._paths, name, attempt=self._attempt, **fields)

    def metrics(self, **fields: Any) -> None:
        """Append a line to metrics.jsonl on rank 0."""
        if self._is_writer:
            append_line(self._paths.metrics, fields)

    def checkpoint_saved(self, name: str) -> None:
        """Show `name` as the newest checkpoint from now on."""
        self._checkpoint = name
        if self._is_writer and self._record:
            self._write_progress()

    def step(self, result: StepResult, seconds: float, consumed_examples: int) -> None:
        """Log one optimizer step that took `seconds`."""
        self._step_seconds.append(seconds)
        self._tokens += result.tokens
        self._seconds += seconds
        last = result.step == self._max_steps
        if not self._is_writer or (result.step % self._spec.logging.every and not last):
            return
        tokens_per_second = self._tokens / max(self._seconds, 1e-9)
        self._tokens, self._seconds = 0, 0.0
        record = {
            "step": result.step,
            "loss": float(result.loss),
            "grad_norm": float(result.grad_norm),
            "lr": result.lr,
            "tokens_per_second": round(tokens_per_second, 1),
            "consumed_examples": consumed_examples,
        }
        self.metrics(**record, tokens=result.tokens, supervised_tokens=result.supervised_tokens)
        eta = (self._max_steps - result.step) * sorted(self._step_seconds)[len(self._step_seconds) // 2]
        self._record = {**record, "eta_seconds": round(eta, 1)}
        if self._spec.logging.progress_bar:
            self.say(_progress_line(record, self._max_steps, eta))
        if last or time.time() - self._last_written >= _PROGRESS_INTERVAL_SECONDS:
            self._write_progress()

    def _write_progress(self) -> None:
        self._last_written = time.time()
        head = {"attempt": self._attempt, "max_steps": self._max_steps}
        tail = {"checkpoint": self._checkpoint, "time": self._last_written}
        write_json(self._paths.progress, {**head, **self._record, **tail})


class ProgressCallback(pl.Callback):
    """Times the steps and hands them to the RunLog."""

    def __init__(self, log: RunLog, consumed_examples: Any) -> None:
        self._log = log
        self._consumed_examples = consumed_examples
        self._began = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        result = cast(SFTGPT, pl_module).last_step
        if result is None:
            raise RuntimeError("a batch ended without a step")
        self._log.step(result, time.perf_counter() - self._began, self._consumed_examples(result.step))


class EvaluationCallback(pl.Callback):
    """Held-out loss before the first step, every `eval_every` steps, and after the last.

    Lightning's validation loop is not used: it averages batches, and runs at batch indices rather than at the ends.
    """

    def __init__(self, batches: StepBatches, every: int | None, log: RunLog, max_steps: int) -> None:
        self._batches = batches
        self._every = every
        self._log = log
        self._max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(cast(SFTGPT, pl_module), 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        if step == self._max_steps or (self._every and step % self._every == 0):
            self._evaluate(cast(SFTGPT, pl_module), step)

    def _evaluate(self, module: SFTGPT, step: int) -> None:
        result = module.evaluate(self._batches[index] for index in range(len(self._batches)))
        self._log.metrics(step=step, eval_loss=result.loss, perplexity=result.perplexity)
        self._log.say(
            f"step {step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.2f} "
            f"({result.examples} examples, {result.supervised_tokens} targets)"
        )


class CheckpointCallback(pl.Callback):
    """Saves every `checkpoint.every` steps, at the end, and when asked to stop; keeps the newest ones."""

    def __init__(self, paths: RunPaths, spec: RunSpec, stop: StopFlag, log: RunLog, max_steps: int) -> None:
        self._paths = paths
        self._spec = spec.checkpoint
        self._stop = stop
        self._log = log
        self._max_steps = max_steps

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.install()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        strategy = cast(MegatronStrategy, trainer.strategy)
        step = trainer.global_step
        stopping = strategy.control.any(bool(self._stop))
        if step == self._max_steps or stopping or (self._spec.every and step % self._spec.every == 0):
            self._save(trainer, strategy.control, step)
        if stopping and step < self._max_steps:
            self._log.say(f"stopping after step {step} as asked ({self._stop.signal_name or 'by another rank'})")
            self._log.event("stop_requested", step=step, signal=self._stop.signal_name)
            trainer.should_stop = True

    def _save(self, trainer: pl.Trainer, control: ControlGroup, step: int) -> None:
        target = self._paths.checkpoint(step)
        began = time.perf_counter()
        trainer.save_checkpoint(target, weights_only=False)
        if trainer.is_global_zero:
            for old in self._paths.complete_checkpoints()[: -max(1, self._spec.keep_last)]:
                shutil.rmtree(old, ignore_errors=True)
        control.barrier()
        self._log.checkpoint_saved(target.name)
        self._log.event("checkpoint_saved", step=step, seconds=round(time.perf_counter() - began, 3))


def _progress_line(record: dict[str, Any], max_steps: int, eta: float) -> str:
    """One log line that is also a progress bar: logs are files, and a bar redrawn in place would be one long line."""
    done = record["step"] * _BAR_WIDTH // max_steps
    minutes, seconds = divmod(int(eta), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
    return (
        f"step {record['step']:>{len(str(max_steps))}}/{max_steps} [{'#' * done}{'.' * (_BAR_WIDTH - done)}] "
        f"loss {record['loss']:.4f}  grad {record['grad_norm']:.3f}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  ETA {clock}"
    )
