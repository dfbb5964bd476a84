"""Early stopping: count evaluations without improvement."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from launcher.contract.spec import EarlyStoppingSpec


def is_better(value: float, than: float, mode: Literal["min", "max"], min_delta: float = 0.0) -> bool:
    """Whether `value` improves on `than` by more than `min_delta`; NaN never does."""
    return value < than - min_delta if mode == "min" else value > than + min_delta


class EarlyStopping:
    """Counts evaluations without improvement."""

    def __init__(self, spec: EarlyStoppingSpec) -> None:
        self._spec = spec
        self.best: float | None = None
        self.best_step = 0
        self.waited = 0

    @property
    def is_due(self) -> bool:
        """Whether patience is at its end."""
        return self._spec.patience is not None and self.waited >= self._spec.patience

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take note of an evaluation; a metric that is not in it counts as no improvement."""
        if self._spec.patience is None:
            return
        value = metrics.get(self._spec.metric, math.nan)
        worst = math.inf if self._spec.mode == "min" else -math.inf
        best = worst if self.best is None else self.best
        if is_better(value, best, self._spec.mode, self._spec.min_delta if self.best is not None else 0.0):
            self.best, self.best_step, self.waited = value, step, 0
        else:
            self.waited += 1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "best_step": self.best_step, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.best, self.best_step, self.waited = state["best"], state["best_step"], state["waited"]
