"""Time the steps and log them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import cast

from sft.engine.module import SFTGPT
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.training.strategy import MegatronStrategy


class ProgressCallback(pl.Callback):
    """Times each step and writes it to the run's log."""

    def __init__(self, log: RunLog, consumed_examples: Callable[[int], int]) -> None:
        self._log = log
        self._consumed_examples = consumed_examples
        self._began = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        resumed = cast(MegatronStrategy, trainer.strategy).resumed_from
        self._log.begin(trainer.global_step, str(resumed or cast(SFTGPT, pl_module).model_dir))

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        result = cast(SFTGPT, pl_module).last_step
        if result is None:
            raise RuntimeError("a batch ended without a step")
        self._log.step(result, time.perf_counter() - self._began, self._consumed_examples(result.step))
