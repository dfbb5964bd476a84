"""The order of examples: a pure function of the step, the same under every data parallel size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from sft.data.batches.sampler import (
    EMPTY_SLOT,
    BatchSchedule,
    CyclicSchedule,
    ExampleSchedule,
    TokenSchedule,
    complete,
    rank_slice,
)

SCHEDULES = st.builds(
    ExampleSchedule,
    num_examples=st.integers(1, 60),
    global_batch_size=st.sampled_from([1, 4, 8, 12]),
    seed=st.integers(-5, 2**63),
    shuffle=st.booleans(),
)


def schedule(num_examples: int = 21, seed: int = 7, shuffle: bool = True) -> ExampleSchedule:
    return ExampleSchedule(num_examples=num_examples, global_batch_size=8, seed=seed, shuffle=shuffle)


def lengths_of(count: int, seed: int = 0) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(1, 60, count)


def token_schedule(count: int = 85, seed: int = 7, shuffle: bool = True, rows: int = 4) -> TokenSchedule:
    return TokenSchedule(lengths=lengths_of(count), row_length=100, rows_per_step=rows, seed=seed, shuffle=shuffle)


def grouped_schedule(num_examples: int = 1003, seed: int = 7) -> ExampleSchedule:
    lengths = lengths_of(num_examples)
    return ExampleSchedule(
        num_examples=num_examples, global_batch_size=8, seed=seed, shuffle=True, group_lengths=lengths
    )


OTHER_SCHEDULES: list[BatchSchedule] = [
    token_schedule(),
    token_schedule(shuffle=False),
    token_schedule(count=3),
    grouped_schedule(),
]


def epoch(batches: BatchSchedule, number: int) -> list[int]:
    first = number * batches.steps_per_epoch
    slots = np.concatenate([batches.examples_at(first + n) for n in range(batches.steps_per_epoch)])
    return [int(i) for i in slots]


@given(SCHEDULES, st.integers(0, 5))
@settings(max_examples=60)
def test_trap_16_the_union_over_an_epoch_is_the_data_once(batches: ExampleSchedule, number: int) -> None:
    """Seen to fail with an order from rng.integers (with replacement)."""
    seen = [i for i in epoch(batches, number) if i != EMPTY_SLOT]
    assert sorted(seen) == list(range(batches.num_examples))


@given(SCHEDULES, st.integers(0, 40))
@settings(max_examples=60)
def test_trap_16_every_data_parallel_size_sees_the_same_global_batch(batches: ExampleSchedule, step: int) -> None:
    """Seen to fail with shards of consecutive slots joined as if they were strided."""
    slots = batches.examples_at(step)
    for dp_size in (size for size in (1, 2, 4) if batches.global_batch_size % size == 0):
        shares = [rank_slice(slots, rank, dp_size) for rank in range(dp_size)]
        assert np.array_equal(np.stack(shares, axis=1).ravel(), slots)


def test_trap_16_a_step_depends_on_nothing_that_was_asked_before() -> None:
    """Resuming is asking for another step. Seen to fail with one generator used epoch after epoch."""
    straight = [schedule().examples_at(step).tolist() for step in range(20)]
    assert [schedule().examples_at(step).tolist() for step in reversed(range(20))] == straight[::-1]
    assert [schedule().examples_at(step).tolist() for step in range(10, 20)] == straight[10:]


def test_trap_17_the_last_short_batch_is_completed_with_empty_slots() -> None:
    """Seen to fail with steps_per_epoch rounded down."""
    batches = schedule()
    assert batches.steps_per_epoch == 3
    assert np.count_nonzero(batches.examples_at(2) == EMPTY_SLOT) == 3
    assert np.count_nonzero(batches.examples_at(1) == EMPTY_SLOT) == 0


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    assert epoch(schedule(), 0) != epoch(schedule(), 1)
    assert epoch(schedule(), 0) != epoch(schedule(seed=8), 0)


def test_without_shuffle_the_order_is_the_files() -> None:
    assert epoch(schedule(shuffle=False), 3)[:21] == list(range(21))


def test_the_order_is_the_same_forever() -> None:
    """A run that is resumed by a newer version must go on in the order it began with."""
    assert schedule(num_examples=8).examples_at(0).tolist() == [6, 3, 4, 0, 2, 7, 5, 1]


def test_consumed_examples_do_not_count_empty_slots() -> None:
    assert [schedule().consumed_examples(steps) for steps in (0, 1, 2, 3, 4)] == [0, 8, 16, 21, 29]


def test_shares_that_do_not_divide_are_refused() -> None:
    slots = schedule().examples_at(0)
    with pytest.raises(ValueError, match="8 slots do not divide over rank 0 of 3"):
        rank_slice(slots, 0, 3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_slice(slots, 2, 2)
    with pytest.raises(ValueError, match="step -1 is negative"):
        schedule().examples_at(-1)
    with pytest.raises(ValueError, match="from 0 examples"):
        schedule(num_examples=0)


@pytest.mark.parametrize("batches", OTHER_SCHEDULES, ids=["tokens", "tokens_in_order", "one_step", "grouped"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_trap_16_rows_and_groups_hold_the_data_once_an_epoch(batches: BatchSchedule, number: int) -> None:
    """Seen to fail with steps_per_epoch rounded down (the last rows are never seen)."""
    seen = [i for i in epoch(batches, number) if i != EMPTY_SLOT]
    assert sorted(seen) == list(range(batches.consumed_examples(batches.steps_per_epoch)))


@pytest.mark.parametrize("batches", OTHER_SCHEDULES, ids=["tokens", "tokens_in_order", "one_step", "grouped"])
def test_trap_16_rows_and_groups_depend_on_nothing_that_was_asked_before(batches: BatchSchedule) -> None:
    """Seen to fail with rows packed in an order from one generator used epoch after epoch."""
    steps = 2 * batches.steps_per_epoch + 1
    straight = [batches.examples_at(step).tolist() for step in range(steps)]
    assert [batches.examples_at(step).tolist() for step in reversed(range(steps))] == straight[::-1]


def test_trap_20_a_step_counted_in_tokens_takes_so_many_rows() -> None:
    """Seen to fail with rows_per_step examples a step."""
    batches = token_schedule()
    for step in range(batches.steps_per_epoch):
        rows = batches.rows_at(step)
        last = step == batches.steps_per_epoch - 1
        assert (len(rows) < 4) if last else (len(rows) == 4)
        assert all(batches.lengths[row].sum() <= 100 for row in rows)
        assert last or batches.lengths[rows.items].sum() >= 0.8 * 400
        assert batches.examples_at(step).tolist() == [i for row in rows for i in row.tolist()]


@pytest.mark.parametrize("shuffle", [True, False])
def test_consumed_examples_of_steps_counted_in_tokens(shuffle: bool) -> None:
    batches = token_schedule(shuffle=shuffle)
    seen = 0
    for step in range(3 * batches.steps_per_epoch):
        assert batches.consumed_examples(step) == seen
        seen += len(batches.examples_at(step))


def test_each_epoch_draws_neighbours_and_order_of_rows_anew() -> None:
    batches = token_schedule()
    epochs = [[i for i in epoch(batches, number) if i != EMPTY_SLOT] for number in (0, 1)]
    neighbours = [
        {frozenset(row.tolist()) for row in batches.rows_at(number * batches.steps_per_epoch)} for number in (0, 1)
    ]
    assert epochs[0] != epochs[1]
    assert neighbours[0] != neighbours[1]


def test_without_shuffle_rows_come_by_their_first_example() -> None:
    batches = token_schedule(shuffle=False)
    first = [int(row.min()) for step in range(batches.steps_per_epoch) for row in batches.rows_at(step)]
    assert first == sorted(first)
    assert epoch(batches, 0) == epoch(batches, 1)


def test_groups_are_of_similar_lengths_and_the_short_batch_stays_last() -> None:
    grouped = grouped_schedule()
    assert np.count_nonzero(grouped.examples_at(grouped.steps_per_epoch - 1) == EMPTY_SLOT) == 5
    assert grouped.group_lengths is not None
    spans = [np.ptp(grouped.group_lengths[grouped.examples_at(step)]) for step in range(grouped.steps_per_epoch - 1)]
    assert np.mean(spans) < 3
    assert epoch(grouped, 0) != epoch(grouped, 1)
    longest = [grouped.group_lengths[grouped.examples_at(step)].max() for step in range(20)]
    assert longest != sorted(longest)


def test_rows_and_groups_are_the_same_forever() -> None:
    lengths = np.array([30, 20, 30, 60, 20, 70, 50, 20])
    batches = TokenSchedule(lengths=lengths, row_length=100, rows_per_step=2, seed=7, shuffle=True)
    grouped = ExampleSchedule(num_examples=8, global_batch_size=2, seed=7, shuffle=True, group_lengths=lengths)
    assert [batches.examples_at(step).tolist() for step in range(2)] == [[3, 2, 6, 4, 7], [5, 0, 1]]
    assert [grouped.examples_at(step).tolist() for step in range(4)] == [[1, 0], [2, 6], [4, 7], [3, 5]]


def test_slots_are_completed_to_a_multiple() -> None:
    assert complete(np.array([4, 5, 6]), 4).tolist() == [4, 5, 6, EMPTY_SLOT]
    assert complete(np.array([4, 5]), 2).tolist() == [4, 5]
    assert complete(np.zeros(0, dtype=np.int64), 2).tolist() == [EMPTY_SLOT, EMPTY_SLOT]


def test_the_cyclic_order_is_that_of_trlx() -> None:
    """Permutation of 20 places at seed 1000, as the original gave it; items are what is left of dividing by 7."""
    places = [7, 12, 17, 6, 15, 19, 10, 11, 2, 0, 4, 13, 1, 5, 14, 18, 16, 8, 9, 3]
    cyclic = CyclicSchedule(num_examples=7, global_batch_size=4, max_steps=5, seed=1000)
    assert [int(i) for step in range(5) for i in cyclic.examples_at(step)] == [place % 7 for place in places]
    assert rank_slice(cyclic.examples_at(1), 1, 2).tolist() == [19 % 7, 11 % 7]
    assert (cyclic.consumed_examples(3), cyclic.steps_per_epoch) == (12, 5)
    with pytest.raises(ValueError, match="step 5 is not in a run of 5 steps"):
        cyclic.examples_at(5)


@pytest.mark.parametrize(("epochs", "steps"), [(1, 3), (2.5, 8), (0.5, 2), (0.01, 1), (1.1, 4), (3.0, 9)])
def test_a_part_of_an_epoch_is_rounded_up_to_steps(epochs: float, steps: int) -> None:
    """As transformers does: ceil(epochs * steps of an epoch). 1.1 * 30 is above 33 in floats."""
    assert schedule(21).steps_per_epoch == 3
    assert schedule(21).steps_in(epochs) == steps
    assert schedule(8 * 30).steps_in(1.1) == 33
    assert CyclicSchedule(num_examples=5, global_batch_size=2, max_steps=3, seed=0).steps_in(epochs) == steps
