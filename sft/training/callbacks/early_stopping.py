"""Early stopping: count evaluations without improvement."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from launcher.contract.spec import RunSpec
from sft.checkpoint.contents import Comparison, EarlyStoppingState


def is_better(value: float, than: float, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Return whether `value` improves on `than` by more than `min_delta`. NaN never does."""
    return value < than - min_delta if mode == "min" else value > than + min_delta


class EarlyStopping:
    """Counts evaluations without improvement."""

    def __init__(self, spec: RunSpec, state: EarlyStoppingState | None = None) -> None:
        self._spec = spec.train.early_stopping
        compared = Comparison(self._spec.metric, self._spec.mode, measured_on(spec, self._spec.metric))
        self.state = EarlyStoppingState(compared=compared)
        if state is not None:
            self.restore(state)

    def restore(self, state: EarlyStoppingState) -> None:
        """Count on from what a checkpoint has seen, unless that was something else: its best says nothing here."""
        own = self.state.compared  # a run that goes on with other settings may have changed it
        if state.compared.agrees(own):
            self.state = dataclasses.replace(state, compared=own)

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


def measured_on(spec: RunSpec, metric: str) -> str:
    """Return the files that evaluations measure this metric on."""
    data = spec.data
    if metric.startswith("metric/"):
        return f"{spec.evaluation.prompts} by {spec.evaluation.metric}"
    _, named, name = metric.partition("/")
    if named:
        return data.validation_sets.get(name, "")
    return " ".join([*data.validation, *([f"{data.validation_split} of data.train"] if data.validation_split else [])])
