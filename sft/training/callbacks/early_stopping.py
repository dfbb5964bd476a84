"""Early stopping: count evaluations without improvement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from launcher.contract.spec import EarlyStoppingSpec
from sft.checkpoint.contents import EarlyStoppingState


def is_better(value: float, than: float, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Return whether `value` improves on `than` by more than `min_delta`. NaN never does."""
    return value < than - min_delta if mode == "min" else value > than + min_delta


class EarlyStopping:
    """Counts evaluations without improvement."""

    def __init__(self, spec: EarlyStoppingSpec, state: EarlyStoppingState | None = None) -> None:
        self._spec = spec
        self.state = EarlyStoppingState(metric=spec.metric, mode=spec.mode)
        if state is not None:
            self.restore(state)

    def restore(self, state: EarlyStoppingState) -> None:
        """Count on from what a checkpoint has seen, unless that was another metric: its best says nothing here."""
        # A run that goes on with other settings may have changed it. Earlier checkpoints do not say which it was.
        if state.metric in (None, self._spec.metric) and state.mode in (None, self._spec.mode):
            self.state = dataclasses.replace(state, metric=self._spec.metric, mode=self._spec.mode)

    @property
    def is_due(self) -> bool:
        """Whether the metric has not improved for `patience` evaluations."""
        return self._spec.patience is not None and self.state.waited >= self._spec.patience

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Count an evaluation. One without the metric counts as no improvement."""
        if self._spec.patience is None:
            return
        value = metrics.get(self._spec.metric, math.nan)
        worst = math.inf if self._spec.mode == "min" else -math.inf
        best, min_delta = (worst, 0.0) if self.state.best is None else (self.state.best, self._spec.min_delta)
        if is_better(value, best, self._spec.mode, min_delta):
            self.state = dataclasses.replace(self.state, best=value, best_step=step, waited=0)
        else:
            self.state = dataclasses.replace(self.state, waited=self.state.waited + 1)
