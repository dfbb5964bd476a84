"""What a training step and an evaluation give."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What one optimizer step gave; tensors stay on the device until somebody logs them."""

    step: int
    """Optimizer steps done, this one included."""
    loss: Tensor
    grad_norm: Tensor
    bad: Tensor
    """1.0 where the update was not applied, because loss or norm is not finite or the norm is a spike."""
    lr: float
    examples: int
    tokens: int
    squared_lengths: int
    supervised_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalResult:
    """Exact token mean over a held-out set."""

    loss: float
    examples: int
    supervised_tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))
