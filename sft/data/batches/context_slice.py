"""What each context parallel rank has of a row: two chunks, and where their queries find their keys.

Of 2 * cp equal chunks of a row, rank r has number r and number 2 * cp - 1 - r. A token attends to all before it, so a
chunk costs the more the later it is; an early and a late one together cost every rank the same. A packed row is cut as
a whole, wherever its sequences begin. Rejected: to cut each of its sequences so, as others do; each would have to be
padded to a multiple of 2 * cp.

Everything that layers need to know of it is computed here on the host, beside the batch, and travels with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """Queries [begin, end) of a row, and the keys they see: those of their own sequences, up to themselves."""

    begin: int
    end: int
    first_key: int
    """Keys are [first_key, end) of the row."""
    query_lengths: tuple[int, ...]
    """Of each sequence that the chunk meets."""
    key_lengths: tuple[int, ...]
    """Of the same sequences. The queries of each are the last of its positions here."""
    query_offsets: Tensor
    """int32: where the sequences begin among the queries, row after row, and their end."""
    key_offsets: Tensor
    """The same among the keys."""

    def to(self, device: torch.device | str, *, non_blocking: bool) -> Chunk:
        """This on `device`."""
        queries, keys = (
            offsets.to(device, non_blocking=non_blocking) for offsets in (self.query_offsets, self.key_offsets)
        )
        return replace(self, query_offsets=queries, key_offsets=keys)

    def pin_memory(self) -> Chunk:
        """This in page-locked memory."""
        return replace(self, query_offsets=self.query_offsets.pin_memory(), key_offsets=self.key_offsets.pin_memory())


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextShare:
    """One context parallel rank's part of a micro-batch."""

    chunks: tuple[Chunk, ...]
    positions: Tensor
    """Place in its own sequence of each token of the part, the same for all rows; [part's length]."""
    supervised: Tensor
    """As MicroBatch.supervised, for the part."""
    longest: int
    """Positions that the row's longest sequence has."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> ContextShare:
        """This on `device`."""
        return replace(
            self,
            chunks=tuple(chunk.to(device, non_blocking=non_blocking) for chunk in self.chunks),
            positions=self.positions.to(device, non_blocking=non_blocking),
            supervised=self.supervised.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> ContextShare:
        """This in page-locked memory."""
        return replace(
            self,
            chunks=tuple(chunk.pin_memory() for chunk in self.chunks),
            positions=self.positions.pin_memory(),
            supervised=self.supervised.pin_memory(),
        )

    def part_of(self, rows: Tensor) -> Tensor:
        """The part of `rows`, [rows, row length] -> [rows, part's length]."""
        return torch.cat([rows[:, chunk.begin : chunk.end] for chunk in self.chunks], dim=1)


def chunk_numbers(rank: int, size: int) -> tuple[int, int]:
    """Which of the 2 * `size` chunks of a row rank `rank` has."""
    return rank, 2 * size - 1 - rank


def share_rows(
    loss_weights: NDArray[np.float32], seq_lengths: Sequence[int] | None, rank: int, size: int
) -> ContextShare:
    """What context parallel rank `rank` of `size` has of rows with these weights, [rows, row length].

    `seq_lengths` cut a packed row; without them each row is one sequence, its padding included.
    """
    rows, length = loss_weights.shape
    width, rest = divmod(length, 2 * size)
    if rest:
        raise ValueError(f"a row of {length} tokens has no {2 * size} equal chunks")
    lengths = np.array([length] if seq_lengths is None else seq_lengths)
    ends = np.cumsum(lengths)
    chunks = [_chunk(ends, number * width, (number + 1) * width, rows) for number in chunk_numbers(rank, size)]
    places = np.concatenate([np.arange(chunk.begin, chunk.end) for chunk in chunks])
    starts = np.repeat(ends - lengths, lengths)
    return ContextShare(
        chunks=tuple(chunks),
        positions=torch.from_numpy(places - starts[places]),
        supervised=torch.from_numpy(np.flatnonzero(loss_weights[:, places].T)),
        longest=int(lengths.max()),
    )


def _chunk(ends: NDArray[np.int64], begin: int, end: int, rows: int) -> Chunk:
    """Queries [begin, end) of rows whose sequences end at `ends`."""
    starts = np.concatenate([[0], ends[:-1]])
    met = (starts < end) & (ends > begin) & (starts < ends)
    first, last = starts[met], np.minimum(ends[met], end)
    queries, keys = last - np.maximum(first, begin), last - first
    return Chunk(
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
