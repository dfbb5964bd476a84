"""Tell the watchdog which phase Lightning's loop is in, by marks between the callbacks, which need not know of it."""

from __future__ import annotations

from collections.abc import Sequence

from sft.health.rank_positions import Phase
from sft.health.watchdog import Watchdog
from sft.runtime import lightning as pl
from sft.training.callbacks.checkpoints import CheckpointCallback
from sft.training.callbacks.copies import CopyCallback
from sft.training.callbacks.evaluation import EvaluationCallback

_PHASES: dict[type[pl.Callback], Phase] = {
    EvaluationCallback: Phase.EVALUATION,
    CheckpointCallback: Phase.CHECKPOINT,
    CopyCallback: Phase.CHECKPOINT,
}
"""The phase of a callback's work at a step boundary; that of all others is Phase.GUARD."""


def watched(callbacks: Sequence[pl.Callback], watchdog: Watchdog) -> list[pl.Callback]:
    """Return the callbacks with marks before, between and after them."""
    marked: list[pl.Callback] = [_Steps(watchdog)]
    for callback in callbacks:
        phase = _PHASES.get(type(callback))
        marked += [_Entering(watchdog, phase), callback] if phase is not None else [callback]
    return [*marked, _Entering(watchdog, Phase.DATA)]


class _Steps(pl.Callback):
    """The first callback: reports batches and steps to the watchdog."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._watchdog.joined()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watchdog.enter(Phase.LOADING, trainer.global_step)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._watchdog.enter(Phase.STEP)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._watchdog.step_finished(trainer.global_step)


class _Entering(pl.Callback):
    """A mark: the callbacks after it are in `phase`."""

    def __init__(self, watchdog: Watchdog, phase: Phase) -> None:
        self._watchdog = watchdog
        self._phase = phase

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._watchdog.enter(self._phase)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        self._watchdog.enter(self._phase)
