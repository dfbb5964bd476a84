"""Give each context parallel rank two slices of every row, and find the keys that their queries attend to.

A row is cut into 2 * cp equal slices, of which rank r has slices r and 2 * cp - 1 - r. A token attends to all tokens
before it, so later slices cost more; an early and a late one together cost every rank the same. A packed row is cut as
a whole, wherever its sequences begin. Rejected: cutting each of its sequences, as other trainers do. Each would have to
be padded to a multiple of 2 * cp.

Everything that layers need to know is computed here, on the host, and travels with the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextSlice:
    """Queries [begin, end) of a row, and the keys they attend to: those of their own sequences, up to themselves."""

    begin: int
    end: int
    first_key: int
    """The keys are [first_key, end) of the row."""
    query_lengths: tuple[int, ...]
    """Queries of each sequence that has some in this slice."""
    key_lengths: tuple[int, ...]
    """Keys of the same sequences. The queries of a sequence are the last of these positions."""
    query_offsets: Tensor
    """int32: where the sequences begin among the queries, row after row, and the end of the last."""
    key_offsets: Tensor
    """The same among the keys."""

    def to(self, device: torch.device | str, *, non_blocking: bool) -> ContextSlice:
        """Return this slice with its tensors on `device`."""
        queries, keys = (
            offsets.to(device, non_blocking=non_blocking) for offsets in (self.query_offsets, self.key_offsets)
        )
        return replace(self, query_offsets=queries, key_offsets=keys)

    def pin_memory(self) -> ContextSlice:
        """Return this slice with its tensors in page-locked memory."""
        return replace(self, query_offsets=self.query_offsets.pin_memory(), key_offsets=self.key_offsets.pin_memory())


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """One context parallel rank's part of a micro-batch."""

    slices: tuple[ContextSlice, ...]
    positions: Tensor
    """Position of each token of the part in its own sequence, [part's length]; the same for all rows."""
    supervised: Tensor
    """As MicroBatch.supervised, for the part."""
    longest: int
    """Length of the row's longest sequence."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> ContextShare:
        """Return this share with its tensors on `device`."""
        return replace(
            self,
            slices=tuple(part.to(device, non_blocking=non_blocking) for part in self.slices),
            positions=self.positions.to(device, non_blocking=non_blocking),
            supervised=self.supervised.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ContextShare:
        """Return this share with its tensors in page-locked memory."""
        return replace(
            self,
            slices=tuple(part.pin_memory() for part in self.slices),
            positions=self.positions.pin_memory(),
            supervised=self.supervised.pin_memory(),
        )

    def part_of(self, rows: Tensor) -> Tensor:
        """Return this rank's part of `rows` [rows, row length], as [rows, part's length]."""
        return torch.cat([rows[:, part.begin : part.end] for part in self.slices], dim=1)


def slice_numbers(rank: int, size: int) -> tuple[int, int]:
    """Return the numbers of the slices that rank `rank` has, of 2 * `size` slices of a row."""
    return rank, 2 * size - 1 - rank


def share_rows(
    loss_weights: NDArray[np.float32], seq_lengths: Sequence[int] | None, rank: int, size: int
) -> ContextShare:
    """Return the share of context parallel rank `rank` of `size` in rows with these weights, [rows, row length].

    `seq_lengths` are those of a packed row; without them each row is one sequence, padding included. Raise ValueError
    if the rows cannot be cut into 2 * `size` equal slices.
    """
    rows, length = loss_weights.shape
    width, rest = divmod(length, 2 * size)
    if rest:
        raise ValueError(f"a row of {length} tokens has no {2 * size} equal slices")
    lengths = np.array([length] if seq_lengths is None else seq_lengths)
    ends = np.cumsum(lengths)
    slices = [_slice(ends, number * width, (number + 1) * width, rows) for number in slice_numbers(rank, size)]
    places = np.concatenate([np.arange(part.begin, part.end) for part in slices])
    starts = np.repeat(ends - lengths, lengths)
    return ContextShare(
        slices=tuple(slices),
        positions=torch.from_numpy(places - starts[places]),
        supervised=torch.from_numpy(np.flatnonzero(loss_weights[:, places].T)),
        longest=int(lengths.max()),
    )


def _slice(ends: NDArray[np.int64], begin: int, end: int, rows: int) -> ContextSlice:
    """Return the slice [begin, end) of `rows` rows whose sequences end at `ends`."""
    starts = np.concatenate([[0], ends[:-1]])
    # Sequences with a query in the slice; the last condition leaves out empty sequences.
    met = (starts < end) & (ends > begin) & (starts < ends)
    first, last = starts[met], np.minimum(ends[met], end)
    queries, keys = last - np.maximum(first, begin), last - first
    return ContextSlice(
        begin=begin,
        end=end,
        first_key=int(first[0]),
        query_lengths=tuple(queries.tolist()),
        key_lengths=tuple(keys.tolist()),
        query_offsets=_offsets(queries, rows),
        key_offsets=_offsets(keys, rows),
    )


def _offsets(lengths: NDArray[np.int64], rows: int) -> Tensor:
    return torch.tensor(np.concatenate([[0], np.cumsum(np.tile(lengths, rows))]), dtype=torch.int32)
