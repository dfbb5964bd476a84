"""AdamW (decoupled weight decay, arXiv:1711.05101) on fp32 master weights, written to the model's weights as well.

This is the version of torch operations, tensor by tensor, for CPUs and as the reference of the tests. On a GPU one
kernel updates all tensors (sft.kernels.triton.adamw).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """Hyperparameters of one parameter group."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class Row(NamedTuple):
    """What is updated together: five flat tensors of equal length, all fp32 except `copy`."""

    weight: Tensor
    """The master weights."""
    grad: Tensor
    mean: Tensor
    """First moment, `exp_avg` in torch."""
    square: Tensor
    """Second moment, `exp_avg_sq` in torch."""
    copy: Tensor
    """The model's weights, in half precision."""


def bias_corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """Return 1 - beta^step for both betas, fp32 [tensors, 2], from the step of each tensor."""
    # In fp64: 1 - 0.999 in fp32 has a relative error of 1e-5.
    return (1 - torch.stack([beta ** steps.double() for beta in betas], dim=1)).float()


@torch.no_grad()
def update(rows: Sequence[Row], corrections: Tensor, scale: Tensor, skip: Tensor, settings: Settings) -> None:
    """Update weights, moments and copies in place, or leave all as they are where `skip` is not 0.

    Gradients are divided by `scale`, moments by their tensor's row of `corrections` [tensors, 2]. `scale` and `skip`
    are tensors of one element on the rows' device.
    """
    for row, correction in zip(rows, corrections, strict=True):
        grad = row.grad / scale
        mean = torch.lerp(row.mean, grad, 1 - settings.betas[0])
        square = torch.lerp(row.square, grad * grad, 1 - settings.betas[1])
        step = mean / correction[0] / ((square / correction[1]).sqrt() + settings.eps)
        weight = row.weight * (1 - settings.lr * settings.weight_decay) - settings.lr * step
        # `where` instead of `if`: reading `skip` would make the host wait for the device.
        for old, new in ((row.mean, mean), (row.square, square), (row.weight, weight), (row.copy, weight)):
            old.copy_(torch.where(skip == 0, new.to(old.dtype), old))
