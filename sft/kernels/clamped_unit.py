"""The gated unit of experts that keeps gate and up projection within a limit, for rows sorted by expert."""

from __future__ import annotations

import torch
from torch import Tensor


def clamped_unit(mixed: Tensor, slope: float, limit: float) -> Tensor:
    """Return (up + 1) * gate * sigmoid(slope * gate), [rows, width], of mixed = [gate, up].

    The gate is at most `limit` before, the up projection between -limit and limit.
    """
    gate, up = mixed.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * (gate * torch.sigmoid(slope * gate))
