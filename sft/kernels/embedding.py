"""Rows of the embedding, whose gradient goes to the weight's buffer row by row.

Autograd's own gradient of a lookup is as large as the vocabulary: for 128,000 tokens of 3,072 dimensions 0.75 GiB are
filled with zeros, a few rows added, and all of it added to the fp32 buffer, for each micro-batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def lookup(weight: Tensor, ids: Tensor, *, partial: bool) -> Tensor:
    """weight [rows, h] and ids [b, s] -> [b, s, h]; 0 for ids that are no rows, which there are only if `partial`."""
    found: Tensor = _Lookup.apply(weight, ids, partial)
    return found


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, partial: bool) -> Tensor:
        ctx.weight = weight
        here = (ids >= 0) & (ids < len(weight)) if partial else None
        ctx.save_for_backward(ids, here)
        if here is None:
            return F.embedding(ids, weight)
        return F.embedding(ids.where(here, 0), weight).masked_fill_(~here.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        ids, here = ctx.saved_tensors
        weight: Tensor = ctx.weight
        buffer: Tensor | None = getattr(weight, "main_grad", None)
        rows = grad.contiguous().view(-1, grad.shape[-1])
        if buffer is None:
            buffer = torch.zeros_like(weight)
            _add_rows(buffer, ids, here, rows)
            return buffer, None, None
        _add_rows(buffer, ids, here, rows)
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
        return torch.empty_like(weight), None, None  # see sft.kernels.weight_gradient


def _add_rows(out: Tensor, ids: Tensor, here: Tensor | None, rows: Tensor) -> None:
    """out[id] += row, for each of ids [b, s] that is `here` and rows [b * s, h], in the same order every time."""
    if out.is_cuda:
        from sft.kernels.triton import embedding as triton_embedding  # Triton is there where CUDA is

        triton_embedding.add_rows(out, (ids if here is None else ids.where(here, -1)).flatten(), rows)
        return
    if here is not None:
        ids, rows = ids.where(here, 0), rows.masked_fill(~here.flatten().unsqueeze(-1), 0.0)
    out.index_add_(0, ids.flatten(), rows.to(out.dtype))
