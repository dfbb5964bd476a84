"""Copies of the run's state in memory: when to make one, and what is told of them."""

from __future__ import annotations

from typing import cast

from launcher.contract.errors import ConfigError
from launcher.contract.job import AttemptName
from launcher.contract.spec import CheckpointSpec
from sft.checkpoint.memory_copies import Made, MemoryCopies
from sft.engine.module import SFTGPT
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.training.strategy import MegatronStrategy


class CopyCallback(pl.Callback):
    """Makes a copy every `checkpoint.copy_every` steps, except where a checkpoint is due.

    It comes after the callback that saves, so that a copy has the states of all others after this step.
    """

    def __init__(self, spec: CheckpointSpec, attempt: str, log: RunLog) -> None:
        assert spec.copy_every is not None, "without it there are no copies"
        self._copy_every = spec.copy_every
        self._checkpoint_every = spec.every
        self._copies: MemoryCopies | None = None
        self._is_first_start = AttemptName(attempt).generation == 0
        self._log = log
        self._told = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        copies = cast(MegatronStrategy, trainer.strategy).copies
        if copies is None:
            return
        lack = copies.lack_of_room(cast(SFTGPT, pl_module))
        if lack is None:
            self._copies = copies
            return
        if self._is_first_start:
            raise ConfigError(f"checkpoint.copy_every: {lack}; leave it out, use more nodes, or have a larger /dev/shm")
        # A run that has come this far is not ended for the sake of copies.
        self._log.say(f"no copies from now on: {lack}")
        self._log.event("copies_off", reason=lack)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        if self._copies is None or trainer.should_stop or not self._is_due(trainer.global_step):
            return
        trainer.save_checkpoint(self._copies.folder, weights_only=False, storage_options=self._copies)
        self._tell(trainer.global_step, self._copies.outcome)

    def _is_due(self, step: int) -> bool:
        saved = self._checkpoint_every is not None and step % self._checkpoint_every == 0
        return step % self._copy_every == 0 and step < self._log.max_steps and not saved

    def _tell(self, step: int, outcome: Made | str) -> None:
        """Tell of the first copy and of each that failed: events of all would be most of a run's."""
        if isinstance(outcome, str):
            self._log.say(f"step {step}: no copy was made: {outcome}; the one before is kept")
            self._log.event("copy_failed", step=step, reason=outcome)
        elif not self._told:
            self._told = True
            size, seconds = f"{outcome.bytes / 2**20:,.1f} MiB", outcome.seconds
            self._log.say(f"step {step}: first copy in memory, {size} of rank 0 in {seconds:.2f} s")
            self._log.event("first_copy", step=step, bytes=outcome.bytes, seconds=round(seconds, 3))
