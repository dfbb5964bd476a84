"""Embedding lookup whose gradient is added to the weight's gradient buffer row by row.

Autograd's own gradient of a lookup is as large as the embedding. With 128,000 tokens of 3,072 dimensions it would fill
0.75 GiB with zeros, add a few rows, and add all of that to the fp32 buffer, in each micro-batch.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.gradient_buffer import buffer_of


def lookup(weight: Tensor, ids: Tensor, *, partial: bool) -> Tensor:
    """Return the rows of `weight` [rows, h] at `ids` [b, s], as [b, s, h].

    With `partial` the weight is one rank's part of the vocabulary: ids outside [0, rows) give zeros. Without it there
    must be none.
    """
    embedded: Tensor = _Lookup.apply(weight, ids, partial)
    return embedded


class _LookupContext(Context, Protocol):
    weight: Tensor


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _LookupContext, weight: Tensor, ids: Tensor, partial: bool) -> Tensor:
        # Not as a saved tensor: backward needs the weight's gradient buffer and none of its values.
        ctx.weight = weight
        here = (ids >= 0) & (ids < len(weight)) if partial else None
        ctx.save_for_backward(ids, here)
        if here is None:
            return F.embedding(ids, weight)
        return F.embedding(ids.where(here, 0), weight).masked_fill_(~here.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: _LookupContext, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ids, here = ctx.saved_tensors
        weight: Tensor = ctx.weight
        buffer = buffer_of(weight)
        rows = grad.contiguous().view(-1, grad.shape[-1])
        if buffer is None:
            own = torch.zeros_like(weight)
            _add_rows(own, ids, here, rows)
            return own, None, None
        _add_rows(buffer.values, ids, here, rows)
        return buffer.answer(), None, None


def _add_rows(out: Tensor, ids: Tensor, here: Tensor | None, rows: Tensor) -> None:
    """Add rows [b * s, h] to out[id], in the same order every time, for the ids [b, s] where `here` is true."""
    if out.is_cuda:
        from sft.kernels.triton import embedding as triton_embedding  # installed with CUDA builds of torch only

        triton_embedding.add_rows(out, (ids if here is None else ids.where(here, -1)).flatten(), rows)
        return
    if here is not None:  # tokens of other ranks add 0 to row 0
        ids, rows = ids.where(here, 0), rows.masked_fill(~here.flatten().unsqueeze(-1), 0.0)
    out.index_add_(0, ids.flatten(), rows.to(out.dtype))
