"""What each context parallel rank gets of a row: every token once, and exactly the keys that it may see."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sft.data.batches.context_slice import ContextShare, share_rows

Row = tuple[list[int], int]


@st.composite
def packed_rows(draw: st.DrawFn) -> Row:
    """Lengths of sequences that fill a row, and a number of ranks that cut it."""
    size = draw(st.integers(1, 4))
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    return [*lengths, *([rest] if (rest := -sum(lengths) % (2 * size)) else [])], size


def shares(lengths: list[int] | None, size: int, weights: np.ndarray) -> list[ContextShare]:
    return [share_rows(weights, lengths, rank, size) for rank in range(size)]


def places(share: ContextShare) -> list[int]:
    """Places in the row of the part's tokens."""
    return [place for part in share.slices for place in range(part.begin, part.end)]


def seen(share: ContextShare) -> dict[int, set[int]]:
    """For each place in the row the places that it attends to, by the lengths alone."""
    found = {}
    for part in share.slices:
        query, key = part.begin, part.first_key
        for queries, keys in zip(part.query_lengths, part.key_lengths, strict=True):
            for number in range(queries):
                found[query + number] = set(range(key, key + keys - queries + number + 1))
            query, key = query + queries, key + keys
        assert (query, key) == (part.end, part.end)
    return found


@given(packed_rows())
def test_each_token_is_computed_once_and_sees_its_own_sequence_up_to_itself(row: Row) -> None:
    lengths, size = row
    length = sum(lengths)
    parts = shares(lengths, size, np.zeros((1, length), dtype=np.float32))
    assert sorted(place for part in parts for place in places(part)) == list(range(length))
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).tolist()
    for part in parts:
        assert seen(part) == {place: set(range(starts[place], place + 1)) for place in places(part)}
        assert part.positions.tolist() == [place - starts[place] for place in places(part)]
        assert part.longest == max(lengths)


@given(packed_rows(), st.integers(1, 3))
def test_ranks_have_equal_parts_and_equal_work_in_rows_of_one_sequence(row: Row, rows: int) -> None:
    lengths, size = row
    parts = shares(None, size, np.zeros((rows, sum(lengths)), dtype=np.float32))
    assert {len(places(part)) for part in parts} == {sum(lengths) // size}
    assert len({sum(len(keys) for keys in seen(part).values()) for part in parts}) == 1


@given(packed_rows(), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_supervised_places_are_those_of_the_part(row: Row, rows: int, seed: int) -> None:
    lengths, size = row
    weights = np.random.default_rng(seed).integers(0, 2, (rows, sum(lengths))).astype(np.float32)
    whole = torch.from_numpy(weights)
    parts = shares(lengths if rows == 1 else None, size, weights)
    for part in parts:
        own = part.part_of(whole)
        chosen = own.t().reshape(-1)[part.supervised]
        assert chosen.all()
        assert len(chosen) == own.count_nonzero()
    assert sum(len(part.supervised) for part in parts) == np.count_nonzero(weights)


def test_offsets_go_row_after_row() -> None:
    """By hand: rows of 8 on rank 0 of 2, which has [0, 2) and [6, 8)."""
    first, second = share_rows(np.zeros((2, 8), dtype=np.float32), None, 0, 2).slices
    assert first.query_offsets.tolist() == first.key_offsets.tolist() == [0, 2, 4]
    assert second.query_offsets.tolist() == [0, 2, 4]
    assert second.key_offsets.tolist() == [0, 8, 16]


def test_keys_begin_with_the_first_sequence_that_a_slice_meets() -> None:
    """By hand: sequences [0, 3) and [3, 8) on rank 1 of 2, which has [2, 4) and [4, 6)."""
    first, second = share_rows(np.zeros((1, 8), dtype=np.float32), [3, 5], 1, 2).slices
    assert (first.first_key, first.query_lengths, first.key_lengths) == (0, (1, 1), (3, 1))
    assert (second.first_key, second.query_lengths, second.key_lengths) == (3, (2,), (3,))


def test_a_row_without_equal_slices_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 10 tokens has no 4 equal slices"):
        share_rows(np.zeros((1, 10), dtype=np.float32), None, 0, 2)
