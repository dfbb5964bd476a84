"""Which examples share a row: best-fit decreasing over lengths, levelled rows, rows of equal cost for every rank.

Lengths are small integers, so the packer works on counts. All examples of one length, and all open rows with the same
space left, are placed in one step: n examples of at most c tokens cost one sort and a number of steps that depends on
the lengths rather than on n. Which of equally long examples goes where is decided by the order they are given in.
The result is that of the textbook algorithm (each example, longest first, into the fullest row that has room).

Two units of the global batch, two ways to use it (`train.global_batch_unit`):

* tokens: the whole epoch is packed at once and a step takes a fixed number of rows (`sampler.TokenBatchPlan`). Rows
  are as full as they can be and stay as they are whatever the layout; how many examples a step holds varies.
* examples: a step holds exactly the examples that it would hold without packing, and is packed by itself. Packing
  is then no more than a way to compute the same gradients. Fewer examples leave the last row half empty, which
  `levelled` mends: the same number of rows, all of them a little shorter, and rows are only computed up to the
  longest one. The number of rows is rounded up to the data parallel size, so that in this unit which examples are
  neighbours depends on the layout; which examples make a step never does, nor anything that the loss depends on.

Rejected: packing the examples unit over the epoch as well (a step would then be examples of matching lengths instead
of the sampler's draw, another training than without packing), cutting examples at the edge of a row (their second
half would be trained without its question), and first-fit in arrival order (some 10 % of the slots stay empty).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Optional

import numpy as np
from numpy.typing import NDArray

EMPTY_ROW = -1
"""Marks a place of a rank that has no row."""
_EQUAL_COST_LENGTH = 24_576
"""Length at which attention costs as much as a layer's matrix products: 12 times the hidden size, here 2048.

It decides only which rank gets which row, never a result, so that one value serves models of all sizes.
"""


@dataclass(frozen=True, slots=True)
class Rows:
    """Indices of examples, row after row; row i is items[offsets[i]:offsets[i + 1]]."""

    items: NDArray[np.int64]
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> NDArray[np.int64]:
        return self.items[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        return (self[row] for row in range(len(self)))

    @classmethod
    def of(cls, rows: Sequence[NDArray[np.int64]]) -> Rows:
        """Rows from a list of them."""
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, dtype=np.int64), *rows]), offsets)


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int, order: Optional[NDArray[np.int64]] = None) -> Rows:
    """Rows of at most `capacity` tokens. Of equally long examples those that come first in `order` are placed first."""
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit into rows of {capacity}")
    arrival = np.arange(len(lengths), dtype=np.int64) if order is None else order
    # Stable sorts of 16-bit numbers are radix sorts, several times as fast as those of wider ones.
    shortfall = (capacity - lengths[arrival]).astype(np.uint16 if capacity < 2**16 else np.int64)
    ranked = arrival[np.argsort(shortfall, kind="stable")]
    counts = np.bincount(lengths, minlength=1)
    open_rows = _OpenRows(capacity)
    row_of = np.empty(len(lengths), dtype=np.int64)
    position = 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        position = open_rows.place(length, int(counts[length]), row_of, position)
    by_row = np.argsort(row_of, kind="stable")
    sizes = np.bincount(row_of, minlength=open_rows.opened)
    return Rows(ranked[by_row], np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)]))


class _OpenRows:
    """Rows with space left, kept by how much."""

    def __init__(self, capacity: int) -> None:
        self.opened = 0
        self._capacity = capacity
        self._by_space: dict[int, list[NDArray[np.int64]]] = {}
        self._spaces = 0
        """Bit s is set where some row has space s: the best fit is then the lowest bit from a length on."""

    def place(self, length: int, count: int, row_of: NDArray[np.int64], position: int) -> int:
        """Write the rows of `count` examples of one length to `row_of` from `position` on; returns where it ended."""
        end = position + count
        while position < end:
            space, rows = self._best_fit(length, end - position)
            # The row that is the best fit for one example stays it for the next as long as there is room.
            each = space // length
            placed = min(end - position, len(rows) * each)
            row_of[position : position + placed] = np.repeat(rows, each)[:placed]
            full, rest = divmod(placed, each)
            self._keep(space - each * length, rows[:full])
            self._keep(space - rest * length, rows[full:])
            position += placed
        return end

    def _best_fit(self, length: int, count: int) -> tuple[int, NDArray[np.int64]]:
        """The smallest space that holds `length`, and as many rows with that space as `count` examples need."""
        fitting = self._spaces >> length
        if not fitting:
            needed = -(-count // (self._capacity // length))
            self.opened += needed
            return self._capacity, np.arange(self.opened - needed, self.opened, dtype=np.int64)
        space = length + (fitting & -fitting).bit_length() - 1
        parts = self._by_space.pop(space)
        rows = np.concatenate(parts) if len(parts) > 1 else parts[0]
        self._spaces ^= 1 << space
        needed = -(-count // (space // length))
        self._keep(space, rows[needed:])
        return space, rows[:needed]

    def _keep(self, space: int, rows: NDArray[np.int64]) -> None:
        if len(rows) and space:
            self._by_space.setdefault(space, []).append(rows)
            self._spaces |= 1 << space


def levelled(lengths: NDArray[np.int64], rows: int, capacity: int) -> Optional[Rows]:
    """`rows` rows of nearly equal lengths, some empty where there are fewer examples; None where one would overflow."""
    filled = [(0, row) for row in range(rows)]
    members: list[list[int]] = [[] for _ in range(rows)]
    for item in np.argsort(-lengths, kind="stable").tolist():
        tokens, row = filled[0]
        tokens += int(lengths[item])
        if tokens > capacity:
            return None
        heapq.heapreplace(filled, (tokens, row))
        members[row].append(item)
    return Rows.of([np.array(row, dtype=np.int64) for row in members])


def pack_step(
    lengths: NDArray[np.int64], capacity: int, ranks: int, multiple: int = 1, planned: Optional[Rows] = None
) -> Rows:
    """The rows of a step whose examples have these lengths.

    As few as best-fit decreasing needs, rounded up to what the ranks need anyway, and levelled where that works.
    Rows that are `planned` stay as they are if there is one for each place, as in every full step counted in tokens.
    """
    packed = best_fit_decreasing(lengths, capacity) if planned is None else planned
    places = ranks * rows_a_rank(len(packed), ranks, multiple)
    if planned is not None and len(planned) == places:
        return planned
    return levelled(lengths, places, capacity) or packed


def rows_a_rank(rows: int, ranks: int, multiple: int = 1) -> int:
    """Rows of each rank, the same for all: at least one, and a multiple of `multiple`."""
    return max(1, -(-rows // (ranks * multiple))) * multiple


def row_cost(lengths: NDArray[np.int64]) -> float:
    """What a row of these examples costs in relation to others: a * s + b * sum(s_i ** 2)."""
    wide = lengths.astype(np.float64)
    return float(wide.sum() + (wide**2).sum() / _EQUAL_COST_LENGTH)


def assign_rows(costs: Sequence[float], ranks: int, multiple: int = 1) -> NDArray[np.int64]:
    """Row of each (rank, micro-batch), EMPTY_ROW where there is none, so that all ranks have about the same cost.

    The costliest row first, each to the rank that has least; every rank ends with equally many places. Micro-batches
    of all ranks go from costly to cheap, which keeps ranks that wait for each other in step.
    """
    each = rows_a_rank(len(costs), ranks, multiple)
    table = np.full((ranks, each), EMPTY_ROW, dtype=np.int64)
    waiting = [(0.0, 0, rank) for rank in range(ranks)]
    for row in sorted(range(len(costs)), key=lambda row: (-costs[row], row)):
        cost, used, rank = heapq.heappop(waiting)
        table[rank, used] = row
        if used + 1 < each:
            heapq.heappush(waiting, (cost + costs[row], used + 1, rank))
    return table
