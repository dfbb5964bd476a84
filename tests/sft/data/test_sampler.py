"""The order of examples: a pure function of the step, the same under every data parallel size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.sampler import EMPTY_SLOT, BatchPlan, rank_slice

PLANS = st.builds(
    BatchPlan,
    num_examples=st.integers(1, 60),
    global_batch_size=st.sampled_from([1, 4, 8, 12]),
    seed=st.integers(-5, 2**63),
    shuffle=st.booleans(),
)


def plan(num_examples: int = 21, seed: int = 7, shuffle: bool = True) -> BatchPlan:
    return BatchPlan(num_examples=num_examples, global_batch_size=8, seed=seed, shuffle=shuffle)


def epoch(batches: BatchPlan, number: int) -> list[int]:
    first = number * batches.steps_per_epoch
    slots = np.concatenate([batches.examples_at(first + n) for n in range(batches.steps_per_epoch)])
    return [int(i) for i in slots]


@given(PLANS, st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_trap_16_the_union_over_an_epoch_is_the_data_once(batches: BatchPlan, number: int) -> None:
    """Seen to fail with an order drawn by rng.integers (with replacement)."""
    seen = [i for i in epoch(batches, number) if i != EMPTY_SLOT]
    assert sorted(seen) == list(range(batches.num_examples))


@given(PLANS, st.integers(0, 40))
@settings(max_examples=60, deadline=None)
def test_trap_16_every_data_parallel_size_sees_the_same_global_batch(batches: BatchPlan, step: int) -> None:
    """Seen to fail with shards of consecutive slots joined as if they were strided."""
    slots = batches.examples_at(step)
    for dp_size in (size for size in (1, 2, 4) if batches.global_batch_size % size == 0):
        shares = [rank_slice(slots, rank, dp_size) for rank in range(dp_size)]
        assert np.array_equal(np.stack(shares, axis=1).ravel(), slots)


def test_trap_16_a_step_depends_on_nothing_that_was_asked_before() -> None:
    """Resume is to ask for another step. Seen to fail with one generator that is drawn from epoch by epoch."""
    straight = [plan().examples_at(step).tolist() for step in range(20)]
    assert [plan().examples_at(step).tolist() for step in reversed(range(20))] == straight[::-1]
    assert [plan().examples_at(step).tolist() for step in range(10, 20)] == straight[10:]


def test_trap_17_the_last_short_batch_is_completed_with_empty_slots() -> None:
    """Seen to fail with steps_per_epoch rounded down."""
    batches = plan()
    assert batches.steps_per_epoch == 3
    assert np.count_nonzero(batches.examples_at(2) == EMPTY_SLOT) == 3
    assert np.count_nonzero(batches.examples_at(1) == EMPTY_SLOT) == 0
    assert batches.epoch_of(2) == 0
    assert batches.epoch_of(3) == 1


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    assert epoch(plan(), 0) != epoch(plan(), 1)
    assert epoch(plan(), 0) != epoch(plan(seed=8), 0)


def test_without_shuffle_the_order_is_the_files() -> None:
    assert epoch(plan(shuffle=False), 3)[:21] == list(range(21))


def test_the_order_is_the_same_forever() -> None:
    """A run that is resumed by a newer version must go on in the order it began with."""
    assert plan(num_examples=8).examples_at(0).tolist() == [6, 3, 4, 0, 2, 7, 5, 1]


def test_consumed_examples_do_not_count_empty_slots() -> None:
    assert [plan().consumed_examples(steps) for steps in (0, 1, 2, 3, 4)] == [0, 8, 16, 21, 29]


def test_shares_that_do_not_divide_are_refused() -> None:
    slots = plan().examples_at(0)
    with pytest.raises(ValueError, match="8 slots do not divide over rank 0 of 3"):
        rank_slice(slots, 0, 3)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        rank_slice(slots, 2, 2)
    with pytest.raises(ValueError, match="step -1 is negative"):
        plan().examples_at(-1)
    with pytest.raises(ValueError, match="from 0 examples"):
        plan(num_examples=0)
