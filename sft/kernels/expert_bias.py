"""Biases of experts, added to rows that are sorted by expert."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels.autograd import Context

_COLUMNS = 1024


def add_expert_bias(rows: Tensor, bias: Tensor, ends: Tensor, *, here: bool = True) -> Tensor:
    """Return rows [rows, width] + the bias [experts, width] of each row's expert, whose rows end where `ends` says.

    Where ranks hold parts of the rows that are added up later, only one of them may add the bias, the one that says
    `here`. The gradient of the bias is whole on each of them, as that of the sum is.
    """
    output: Tensor = _AddExpertBias.apply(rows, bias, ends, here)
    return output


def by_row(bias: Tensor, rows: int, ends: Tensor) -> Tensor:
    """Return the bias [experts, width] of each of the sorted rows' experts, [rows, width]."""
    # A search instead of repeating each expert by its number of rows, for which the host would have to know them.
    return bias.index_select(0, torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True))


def sums_by_expert(rows: Tensor, ends: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return the sum of each expert's rows, [experts, width], of zeros where it has none, in fp32 or wider.

    With `weights` [rows] each row is multiplied first.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    # Each sum is made by one thread from first to last: without atomic additions, two runs give the same bits.
    offsets = torch.cat([ends.new_zeros(1), ends]).long()
    parts = []
    for part in rows.split(_COLUMNS, dim=1):  # all of them at once would be twice the rows in bf16
        values = part.to(wide).contiguous() if weights is None else part.to(wide) * weights.unsqueeze(-1)
        parts.append(torch.segment_reduce(values, "sum", offsets=offsets, axis=0, unsafe=True))
    return torch.cat(parts, dim=1)


class _SavedType(Context, Protocol):
    dtype: torch.dtype


class _AddExpertBias(torch.autograd.Function):
    """Indexing's own backward pass would add up with atomic additions, and in the rows' type."""

    @staticmethod
    def forward(ctx: _SavedType, rows: Tensor, bias: Tensor, ends: Tensor, here: bool) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.dtype = bias.dtype
        return rows + by_row(bias, len(rows), ends) if here else rows.view_as(rows)

    @staticmethod
    def backward(ctx: _SavedType, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (ends,) = ctx.saved_tensors
        own = sums_by_expert(grads[0], ends).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        return grads[0], own, None, None
