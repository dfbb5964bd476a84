"""The results of a training step and of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The result of one optimizer step. Its tensors stay on the device until they are logged."""

    step: int
    """Number of optimizer steps done, this one included."""
    loss: Tensor
    grad_norm: Tensor
    bad: Tensor
    """1.0 if the update was skipped because loss or norm is not finite, or the norm is a spike; else 0.0."""
    lr: float
    examples: int
    tokens: int
    squared_lengths: int
    supervised_tokens: int
    routing: Tensor | None = None
    """How experts were used (`sft.engine.routing.NUMBERS`), in a step that is logged of a model that has some."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """The exact mean over the tokens of a held-out set."""

    loss: float
    examples: int
    supervised_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))
