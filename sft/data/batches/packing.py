"""Decide which examples share a row: best-fit decreasing by length, levelled rows, and equal cost for every rank.

Lengths are small integers, so the packer works on counts. All examples of one length, and all open rows with the same
space left, are placed in one step: n examples of at most c tokens cost one sort and a number of steps that depends on
the lengths rather than on n. The order in which equally long examples are given decides which goes where. The result is
that of the textbook algorithm: each example, longest first, into the fullest row that has room.

It is used in two ways, depending on the unit of the global batch (`train.global_batch_unit`):

* tokens: the whole epoch is packed at once and a step takes a fixed number of rows (`sampler.TokenSchedule`). Rows are
  as full as they can be and do not depend on the topology. The number of examples in a step varies.
* examples: a step holds exactly the examples that it would hold without packing, and is packed by itself. Packing is
  then only a way to compute the same gradients. With few examples the last row stays half empty, so `levelled` makes
  the same number of rows of nearly equal length: rows are only computed up to the longest. The number of rows is
  rounded up to a multiple of the data parallel size, so which examples share a row depends on the topology. Which
  examples make a step does not, nor does the loss.

Rejected: packing the whole epoch in the examples unit too (a step would hold examples whose lengths fit together
instead of a random choice, so packing would change the training), cutting examples at the end of a row (the second half
would be trained without its question), and first-fit in the given order (about 10 % of the slots stay empty).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from launcher.contract.divisors import rounded_up

EMPTY_ROW = -1
"""Stands where a rank has no row."""
_EQUAL_COST_LENGTH = 24_576
"""Length at which attention costs as much as a layer's matrix products: 12 times a hidden size of 2048.

It only decides which rank gets which row, not any result, so one value is good enough for models of all sizes.
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
        """Make Rows from a list of rows."""
        offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        return cls(np.concatenate([np.zeros(0, dtype=np.int64), *rows]), offsets)


def best_fit_decreasing(lengths: NDArray[np.int64], capacity: int, order: NDArray[np.int64] | None = None) -> Rows:
    """Pack examples of these lengths into rows of at most `capacity` tokens, and return the rows.

    Of equally long examples, those first in `order` (a permutation) are placed first. Raise ValueError for an example
    that is empty or does not fit into a row.
    """
    if len(lengths) and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} do not fit into rows of {capacity}")
    arrival = np.arange(len(lengths), dtype=np.int64) if order is None else order
    # Longest first. numpy's stable sort of 16-bit numbers is a radix sort, several times as fast as that of wider ones.
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
    """Rows with space left, grouped by the amount of space."""

    def __init__(self, capacity: int) -> None:
        self.opened = 0
        self._capacity = capacity
        self._by_space: dict[int, list[NDArray[np.int64]]] = {}
        self._spaces = 0
        """Bit s is set if some row has space s. The best fit for a length is the lowest bit set from there on."""

    def place(self, length: int, count: int, row_of: NDArray[np.int64], position: int) -> int:
        """Place `count` examples of one length: write their rows to `row_of` from `position` on, and return the end."""
        end = position + count
        while position < end:
            space, rows = self._best_fit(length, end - position)
            # A row that is the best fit for one example is so for the next, as long as there is room.
            each = space // length
            placed = min(end - position, len(rows) * each)
            row_of[position : position + placed] = np.repeat(rows, each)[:placed]
            full, rest = divmod(placed, each)
            self._keep(space - each * length, rows[:full])
            self._keep(space - rest * length, rows[full:])
            position += placed
        return end

    def _best_fit(self, length: int, count: int) -> tuple[int, NDArray[np.int64]]:
        """Return the smallest space that holds `length`, and as many rows with it as `count` examples need.

        The rows are taken out; the caller puts back those that have space left. New rows are opened if none fits.
        """
        fitting = self._spaces >> length
        if not fitting:
            needed = -(-count // (self._capacity // length))
            self.opened += needed
            return self._capacity, np.arange(self.opened - needed, self.opened, dtype=np.int64)
        space = length + (fitting & -fitting).bit_length() - 1  # the lowest bit that is set
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


def levelled(lengths: NDArray[np.int64], rows: int, capacity: int) -> Rows | None:
    """Return `rows` rows of nearly equal length, or None if one would be longer than `capacity`.

    Some rows are empty where there are fewer examples than rows.
    """
    # Each example, longest first, into the row with the fewest tokens.
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
    lengths: NDArray[np.int64], capacity: int, ranks: int, multiple: int = 1, planned: Rows | None = None
) -> Rows:
    """Return the rows of a step whose examples have these lengths.

    They are as few as best-fit decreasing needs, rounded up to what all ranks compute anyway, and of nearly equal
    length where that is possible. Rows that the schedule has `planned` stay as they are if they need no rounding, as in
    every full step of a TokenSchedule.
    """
    packed = best_fit_decreasing(lengths, capacity) if planned is None else planned
    places = ranks * rows_a_rank(len(packed), ranks, multiple)
    if planned is not None and len(planned) == places:
        return planned
    return levelled(lengths, places, capacity) or packed


def rows_a_rank(rows: int, ranks: int, multiple: int = 1) -> int:
    """Return the rows of each rank, the same for all: a multiple of `multiple`, at least one time."""
    return rounded_up(max(1, rows), ranks * multiple) // ranks


def row_cost(lengths: NDArray[np.int64]) -> float:
    """Return the relative cost of a row of these examples: sum(s) for matrix products, plus sum(s^2) for attention."""
    wide = lengths.astype(np.float64)
    return float(wide.sum() + (wide**2).sum() / _EQUAL_COST_LENGTH)


def assign_rows(costs: Sequence[float], ranks: int, multiple: int = 1) -> NDArray[np.int64]:
    """Return the row of each (rank, micro-batch) so that all ranks have about the same cost, EMPTY_ROW for no row.

    The costliest row goes first, each to the rank with the least cost so far; all ranks have equally many places. So
    the micro-batches of every rank go from costly to cheap, and ranks that wait for each other stay in step.
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
