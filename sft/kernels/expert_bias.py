"""Biases of experts, added to rows that are sorted by expert."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels.autograd import Context


def add_expert_bias(rows: Tensor, bias: Tensor, ends: Tensor, *, here: bool = True) -> Tensor:
    """Return rows [rows, width] + the bias [experts, width] of each row's expert, whose rows end where `ends` says.

    Where ranks hold parts of the rows that are added up later, only one of them may add the bias, the one that says
    `here`. The gradient of the bias is whole on each of them, as that of the sum is.
    """
    output: Tensor = _AddExpertBias.apply(rows, bias, ends, here)
    return output


class _SavedType(Context, Protocol):
    dtype: torch.dtype


class _AddExpertBias(torch.autograd.Function):
    """Indexing's own backward pass would add up with atomic additions, and in the rows' type."""

    @staticmethod
    def forward(ctx: _SavedType, rows: Tensor, bias: Tensor, ends: Tensor, here: bool) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.dtype = bias.dtype
        if not here:
            return rows.view_as(rows)
        # A search instead of repeating each expert by its number of rows, for which the host would have to know them.
        experts = torch.searchsorted(ends, torch.arange(len(rows), device=rows.device), right=True)
        return rows + bias.index_select(0, experts)

    @staticmethod
    def backward(ctx: _SavedType, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (ends,) = ctx.saved_tensors
        if not ctx.needs_input_grad[1]:
            return grads[0], None, None, None
        wide = grads[0].to(torch.promote_types(ctx.dtype, torch.float32))
        offsets = torch.cat([ends.new_zeros(1), ends]).long()
        return (
            grads[0],
            torch.segment_reduce(wide, "sum", offsets=offsets, axis=0, unsafe=True).to(ctx.dtype),
            None,
            None,
        )
