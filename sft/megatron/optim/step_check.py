"""Decide on the device whether a step is bad, so that the optimizer must not apply it.

A spike is a multiple of the running mean of the gradient norms of good steps. The mean is a tensor as well, so that
nothing here waits for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DECAY = 0.98
"""The running mean looks back about 50 steps."""
_FIRST_STEPS = 10
"""Good steps before a norm can be a spike: the first norms of a run are large and few."""


class StepJudge:
    """Returns 1.0 for a step whose loss or gradient norm is not finite, or whose norm is a spike; else 0.0."""

    def __init__(self, spike_factor: float | None) -> None:
        self._factor = spike_factor
        self._norms = torch.zeros(3, dtype=torch.float64)
        """Decaying sum of norms, the sum of its weights, and the number of good steps."""

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        if self._factor is None:
            return bad.float()
        self._norms = self._norms.to(norm.device)
        total, weight, steps = self._norms
        mean = total / weight.clamp(min=1e-12)
        bad |= (steps >= _FIRST_STEPS) & (norm > self._factor * mean)
        with_this = (_DECAY * total + (1 - _DECAY) * norm, _DECAY * weight + (1 - _DECAY), steps + 1)
        self._norms = torch.where(bad, self._norms, torch.stack(with_this))
        return bad.float()

    def state(self) -> list[float]:
        """Return the running mean for a checkpoint. This waits for the device."""
        return [float(value) for value in self._norms.tolist()]

    def restore(self, state: list[float]) -> None:
        self._norms = torch.tensor(state, dtype=torch.float64)
