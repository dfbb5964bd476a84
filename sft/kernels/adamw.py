"""AdamW (decoupled weight decay, arXiv:1711.05101) over fp32 master weights that writes their rounded copies as well.

On a GPU all tensors go through one kernel (`triton_adamw`); elsewhere the same is computed by torch, one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Settings(NamedTuple):
    """Of one parameter group."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float


class Row(NamedTuple):
    """Flat tensors of one size, fp32 but for the copy."""

    weight: Tensor
    grad: Tensor
    mean: Tensor
    square: Tensor
    copy: Tensor


def bias_corrections(steps: Tensor, betas: tuple[float, float]) -> Tensor:
    """1 - beta^step, [steps, 2], taken in fp64: after one step 1 - 0.999 in fp32 would be off by 1e-5."""
    return (1 - torch.stack([beta ** steps.double() for beta in betas], dim=1)).float()


@torch.no_grad()
def update(rows: Sequence[Row], corrections: Tensor, scale: Tensor, skip: Tensor, settings: Settings) -> None:
    """Update weights, moments and copies in place; nothing where `skip` is not 0.

    Gradients are divided by `scale`, moments by their tensor's row of `corrections`, [tensors, 2].
    """
    for row, correction in zip(rows, corrections, strict=True):
        grad = row.grad / scale
        mean = torch.lerp(row.mean, grad, 1 - settings.betas[0])
        square = torch.lerp(row.square, grad * grad, 1 - settings.betas[1])
        step = mean / correction[0] / ((square / correction[1]).sqrt() + settings.eps)
        weight = row.weight * (1 - settings.lr * settings.weight_decay) - settings.lr * step
        for old, new in ((row.mean, mean), (row.square, square), (row.weight, weight), (row.copy, weight)):
            old.copy_(torch.where(skip == 0, new.to(old.dtype), old))
