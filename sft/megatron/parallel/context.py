"""Context parallelism: what the layers know of rows that ranks share, and the gathering of keys and values.

Each rank has two slices of every row (sft.data.batches.context_slice). Only attention looks beyond them: it gathers
the keys and values of the whole row from the ranks of the group, and the gradients of them go back as sums. Rejected:
keys and values that go round in a ring. That hides the messages behind the computation and holds no whole rows, but
partial results have to be merged by the softmax's denominators, which not every kernel returns, and offsets be cut for
each turn; with few KV heads a row's keys are small beside its activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sft.data.batches.context_slice import ContextShare, ContextSlice, slice_numbers
from sft.megatron.core import parallel_state
from sft.megatron.parallel.documents import Documents, Rows


@dataclass
class SharedRows(Rows):
    """This rank's part of rows that a context parallel group shares, for RoPE and attention of every layer."""

    slices: tuple[ContextSlice, ...] = ()
    positions: Tensor | None = None
    """Place of each token of the part in its own sequence, [s]."""
    seq_lengths: tuple[int, ...] | None = None
    """Lengths of the sequences of the whole row, on the host; None where each row is one sequence."""


def shared_rows(
    share: ContextShare, documents: Documents | None = None, seq_lengths: tuple[int, ...] | None = None
) -> SharedRows:
    """Return what the layers must know of this rank's part of the rows.

    The format says that tensors keep the dimension of rows: with `thd`, packed rows', Megatron-core would turn queries
    and keys by segments of its own.
    """
    return SharedRows(
        qkv_format="sbhd",
        max_seqlen_q=share.longest,
        max_seqlen_kv=share.longest,
        slices=share.slices,
        positions=share.positions,
        documents=documents,
        seq_lengths=seq_lengths,
    )


def gather_rows(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of whole rows in their order, [s * cp, ...], from each rank's part, [s, ...]."""
    group = parallel_state.get_context_parallel_group()
    whole: tuple[Tensor, Tensor] = _GatherRows.apply(key, value, group)  # type: ignore[no-untyped-call]
    return whole


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, key: Tensor, value: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        ctx.group = group
        own = torch.cat([key, value])
        gathered = own.new_empty(group.size() * own.size(0), *own.shape[1:])
        dist.all_gather_into_tensor(gathered, own, group=group)
        pieces = dict(zip(_as_sent(group.size()), gathered.chunk(4 * group.size()), strict=True))
        key, value = (torch.cat([pieces[which, number] for number in range(2 * group.size())]) for which in (0, 1))
        return key, value

    @staticmethod
    def backward(ctx: Any, grad_key: Tensor, grad_value: Tensor) -> tuple[Tensor, Tensor, None]:
        size = ctx.group.size()
        chunks = [grad.chunk(2 * size) for grad in (grad_key, grad_value)]
        wanted = torch.cat([chunks[which][number] for which, number in _as_sent(size)])
        own = wanted.new_empty(wanted.size(0) // size, *wanted.shape[1:])
        dist.reduce_scatter_tensor(own, wanted, group=ctx.group)
        key, value = own.chunk(2)
        return key, value, None


def _as_sent(size: int) -> list[tuple[int, int]]:
    """Return (0 for keys or 1 for values, number of the slice) for all slices, in the order of the group's ranks."""
    return [(which, number) for rank in range(size) for which in (0, 1) for number in slice_numbers(rank, size)]
