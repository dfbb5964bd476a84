"""Ranks that share rows exchange tokens of all heads for whole rows of some heads, and back.

Linear attention goes through a row from its begin to its end, and each rank has two slices of every row
(sft.data.batches.context_slice). Heads do not depend on one another. Rejected: states that are passed from rank to
rank, each of which would wait for the one before.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sft.data.batches.context_slice import slice_numbers


def to_whole_rows(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return whole rows of this rank's share of the heads, [s * cp, b, heads / cp, ...], from [s, b, heads, ...]."""
    whole: Tensor = _ToWholeRows.apply(part, group)  # type: ignore[no-untyped-call]
    return whole


def to_all_heads(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return this rank's part of the rows with all heads: the reverse of `to_whole_rows`."""
    part: Tensor = _ToAllHeads.apply(whole, group)  # type: ignore[no-untyped-call]
    return part


class _ToWholeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _whole_rows(part, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_heads(grad, ctx.group), None


class _ToAllHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_heads(whole, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _whole_rows(grad, ctx.group), None


def _whole_rows(part: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = group.size()
    found = _exchanged(torch.stack(part.chunk(size, dim=2)), group)
    slices = {
        number: piece
        for rank, own in enumerate(found)
        for number, piece in zip(slice_numbers(rank, size), own.chunk(2), strict=True)
    }
    return torch.cat([slices[number] for number in range(2 * size)])


def _all_heads(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    size = group.size()
    slices = whole.chunk(2 * size)
    wanted = [torch.cat([slices[number] for number in slice_numbers(rank, size)]) for rank in range(size)]
    return torch.cat(list(_exchanged(torch.stack(wanted), group)), dim=2)


def _exchanged(sent: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return what each rank has sent to this one, [ranks, ...], from what this one sends to each."""
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return received
