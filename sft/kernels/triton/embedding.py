"""Add rows to a table at given places, in Triton.

The places are sorted first, and one program sums all rows of one place in fp32. So there are no atomics, a repeated
step gives the same bits, and the sum is rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROWS = 8
_COLUMNS = 1024


@triton.jit
def _add_rows(
    table_ptr, place_ptr, order_ptr, rows_ptr, count, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    # A program for each sorted entry and block of columns. The first entry of each place sums all of them, the programs
    # of the others end at once.
    first = tl.program_id(0)
    place = tl.load(place_ptr + first)
    before = tl.load(place_ptr + first - 1, mask=first > 0, other=-1)
    if (place >= 0) & (place != before):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < columns
        total = tl.zeros((COLUMNS,), dtype=tl.float32)
        summed = ROWS
        while summed == ROWS:  # fewer than ROWS entries of this place: the next ones are another's
            entry = first + tl.arange(0, ROWS)
            same = (entry < count) & (tl.load(place_ptr + entry, mask=entry < count, other=-1) == place)
            source = tl.load(order_ptr + entry, mask=same, other=0)
            cells = source[:, None] * columns + column[None, :]
            row = tl.load(rows_ptr + cells, mask=same[:, None] & inside[None, :], other=0.0)
            total += tl.sum(row.to(tl.float32), axis=0)
            summed = tl.sum(same.to(tl.int32), axis=0)
            first += ROWS
        target = table_ptr + place * columns + column
        total += tl.load(target, mask=inside, other=0.0).to(tl.float32)
        tl.store(target, total.to(table_ptr.dtype.element_ty), mask=inside)


def add_rows(table: Tensor, places: Tensor, rows: Tensor) -> None:
    """Add rows [n, columns], contiguous, to table[places]. Rows with a negative place are left out."""
    count, columns = rows.shape
    ordered, order = places.sort(stable=True)  # stable: equal places keep the order in which they are summed
    grid = (count, triton.cdiv(columns, _COLUMNS))
    _add_rows[grid](table, ordered, order, rows, count, columns, ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4)
