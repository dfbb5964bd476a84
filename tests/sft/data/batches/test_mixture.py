"""Sources with weights: what an epoch takes is counted exactly, whatever the weights, the epochs and the schedule."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.batches.mixture import Mixture, Share
from sft.data.batches.sampler import EMPTY_SLOT, BatchSchedule, ExampleSchedule, TokenSchedule

SHARES = st.lists(
    st.builds(
        Share,
        name=st.just("s"),
        weight=st.one_of(st.floats(0.02, 4), st.sampled_from([0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 0.07, 1.15])),
        examples=st.integers(1, 30),
    ).filter(lambda share: share.taken > 0),
    min_size=1,
    max_size=4,
).map(lambda shares: tuple(Share(name=f"s{i}", weight=s.weight, examples=s.examples) for i, s in enumerate(shares)))
MIXTURES = st.builds(Mixture, shares=SHARES, seed=st.integers(-5, 2**63), shuffle=st.booleans())
KINDS = ["examples", "grouped", "tokens"]


def schedule_of(mixture: Mixture, kind: str = "examples", size: int = 8) -> BatchSchedule:
    count = sum(share.examples for share in mixture.shares)
    lengths = np.random.default_rng(0).integers(1, 60, count)
    both = {"seed": mixture.seed, "shuffle": mixture.shuffle, "mixture": mixture}
    if kind == "tokens":
        return TokenSchedule(lengths=lengths, row_length=100, rows_per_step=size // 4, **both)
    grouped = lengths if kind == "grouped" and mixture.shuffle else None
    return ExampleSchedule(num_examples=count, global_batch_size=size, group_lengths=grouped, **both)


def two(weight: float = 2.5, seed: int = 7, shuffle: bool = True) -> Mixture:
    shares = (Share(name="chat", weight=1.0, examples=10), Share(name="math", weight=weight, examples=7))
    return Mixture(shares=shares, seed=seed, shuffle=shuffle)


def taken_by(schedule: BatchSchedule, epochs: range) -> Counter[int]:
    """How often each example is taken in these epochs."""
    steps = range(schedule.steps_in(epochs.start), schedule.steps_in(epochs.stop))
    slots = np.concatenate([schedule.examples_at(step) for step in steps])
    return Counter(slots[slots != EMPTY_SLOT].tolist())


@given(MIXTURES, st.integers(0, 6), st.integers(1, 9), st.sampled_from(KINDS))
@settings(max_examples=150)
def test_counts_are_exact_in_any_epochs(mixture: Mixture, first: int, epochs: int, kind: str) -> None:
    """Seen to fail with a new random rest in each epoch, and with one that starts over in each epoch."""
    counts = taken_by(schedule_of(mixture, kind), range(first, first + epochs))
    begin = 0
    for share in mixture.shares:
        mine = [counts[example] for example in range(begin, begin + share.examples)]
        assert sum(mine) == epochs * share.taken
        assert max(mine) - min(mine) <= 1
        begin += share.examples
    assert counts.total() == epochs * mixture.size


@given(SHARES)
def test_what_is_taken_is_the_weight_as_it_was_written(shares: tuple[Share, ...]) -> None:
    for share in shares:
        assert abs(share.taken - Fraction(str(share.weight)) * share.examples) <= Fraction(1, 2)
        assert share.copies * share.examples + share.rest == share.taken


@pytest.mark.parametrize(
    ("weight", "examples", "taken"),
    [
        (2.5, 4, 10),
        (2.5, 5, 13),
        (0.15, 10, 2),
        (0.145, 100, 15),
        (1.005, 1000, 1005),
        (0.999, 10, 10),
        (1e-5, 10**6, 10),
    ],
)
def test_a_half_is_rounded_up(weight: float, examples: int, taken: int) -> None:
    """As floats 0.145 x 100 is below 14.5; to the even number 2.5 x 5 is 12. Seen to fail with either."""
    assert Share(name="s", weight=weight, examples=examples).taken == taken


@given(MIXTURES, st.sampled_from(KINDS))
@settings(max_examples=60)
def test_any_step_can_be_asked_first(mixture: Mixture, kind: str) -> None:
    """Resuming is asking for another step. Seen to fail with steps of unequal epochs counted from the last one."""
    schedule = schedule_of(mixture, kind)
    steps = range(schedule.steps_in(3))
    straight = [schedule.examples_at(step).tolist() for step in steps]
    again = schedule_of(mixture, kind)
    assert [again.examples_at(step).tolist() for step in reversed(steps)] == straight[::-1]
    seen = 0
    for step in steps:
        assert again.consumed_examples(step) == seen
        seen += np.count_nonzero(schedule.examples_at(step) != EMPTY_SLOT)
    assert again.consumed_examples(len(steps)) == seen == 3 * mixture.size


def test_groups_are_of_similar_lengths_whatever_is_taken() -> None:
    """Seen to fail with the lengths of places taken for those of examples."""
    shares = tuple(Share(name=name, weight=weight, examples=300) for name, weight in (("a", 0.5), ("b", 2.3)))
    schedule = schedule_of(Mixture(shares=shares, seed=7, shuffle=True), "grouped")
    assert isinstance(schedule, ExampleSchedule)
    assert schedule.group_lengths is not None
    full = range(schedule.steps_per_epoch, 2 * schedule.steps_per_epoch - 1)
    assert np.mean([np.ptp(schedule.group_lengths[schedule.examples_at(step)]) for step in full]) < 3


def test_the_worked_example_of_the_docs() -> None:
    """docs/how-to/data.md: what four epochs use of chat, math and code."""
    named = (("chat", 1.0, 1000), ("math", 2.5, 201), ("code", 0.3, 5000))
    shares = tuple(Share(name=name, weight=weight, examples=count) for name, weight, count in named)
    schedule = schedule_of(Mixture(shares=shares, seed=1, shuffle=True), size=64)
    assert schedule.consumed_examples(schedule.steps_in(1)) == 3003
    used = taken_by(schedule, range(4))
    chat, math, code = (Counter(used[i] for i in part) for part in (range(1000), range(1000, 1201), range(1201, 6201)))
    assert (chat, math, code) == ({4: 1000}, {10: 199, 11: 2}, {1: 4000, 2: 1000})


def test_weights_of_one_are_the_files_of_one_data_set() -> None:
    shares = tuple(Share(name=name, weight=1.0, examples=10) for name in "ab")
    mixed = schedule_of(Mixture(shares=shares, seed=7, shuffle=True))
    plain = ExampleSchedule(num_examples=20, global_batch_size=8, seed=7, shuffle=True)
    assert all(np.array_equal(mixed.examples_at(step), plain.examples_at(step)) for step in range(9))


def test_in_order_sources_come_one_after_another() -> None:
    schedule = schedule_of(two(1.5, shuffle=False), size=21)
    epochs = [schedule.examples_at(step).tolist() for step in range(2)]
    assert epochs[0] == [*range(10), *range(10, 17), 10, 11, 12, 13]
    assert epochs[1] == [*range(10), *range(10, 17), 14, 15, 16, 10]


def test_the_draw_is_the_same_forever() -> None:
    """A run that is resumed by a newer version must go on in the order it began with."""
    assert two(0.5).examples(1, np.arange(10, 14)).tolist() == [10, 12, 13, 16]
    assert schedule_of(two(0.5), size=14).examples_at(1).tolist() == [12, 1, 3, 2, 10, 7, 8, 4, 5, 9, 0, 13, 16, 6]


def test_sources_draw_by_name_and_seed() -> None:
    """So that to add a source leaves the rests of the others as they were."""
    rests = {seed: two(0.5, seed=seed).examples(0, np.arange(10, 14)).tolist() for seed in (7, 8)}
    assert rests[7] != rests[8]
    alone = Mixture(shares=two(0.5).shares[1:], seed=7, shuffle=True)
    assert (alone.examples(0, np.arange(4)) + 10).tolist() == rests[7]
