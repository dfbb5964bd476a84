"""Which examples belong to which optimizer step, as a pure function of the step.

A plan knows nothing of ranks: it says which examples a global batch holds, and a rank then takes its share. So a
run may stop, and go on with another data parallel size, and still sees every example once an epoch. There is no
state to save: to resume is to ask for another step.

The global batch is counted in examples (`BatchPlan`) or in tokens (`TokenBatchPlan`). Neither asks whether rows are
packed: the same run with packing on or off takes the same examples in the same steps, and so the same gradients.

Rejected: torch's DistributedSampler (its order depends on the number of ranks and its position is lost on resume),
dropping the last short batch (data that is never seen), and wrapping it around (data that is seen twice).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Protocol

import numpy as np
from numpy.typing import NDArray

from sft.data.packing import Rows, best_fit_decreasing

EMPTY_SLOT = -1
"""Marks a place of the global batch that holds no example."""
_WINDOW_BATCHES = 64
"""Global batches whose examples are sorted together by `group_by_length`: enough for batches of nearly equal lengths,
few enough that which examples meet in a batch is still a matter of the shuffle."""


class StepPlan(Protocol):
    """Which examples each step holds."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen once; the last one may be short of examples."""
        ...

    @property
    def identity(self) -> list[object]:
        """What, beside the data themselves, decides the sequence of global batches."""
        ...

    def examples_at(self, step: int) -> NDArray[np.int64]:
        """Example ids of the whole global batch of `step` (from 0), EMPTY_SLOT where there is none."""
        ...

    def rows_at(self, step: int) -> Optional[Rows]:
        """The rows in which the step's examples are to be packed; None where the plan leaves it open."""
        ...

    def consumed_examples(self, steps: int) -> int:
        """Examples seen in the first `steps` steps."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchPlan:
    """The order of examples for `seed`, cut into global batches of equally many."""

    num_examples: int
    global_batch_size: int
    seed: int
    shuffle: bool
    group_lengths: Optional[NDArray[np.int64]] = None
    """Length of each example where batches are to be of similar lengths; None leaves the order alone."""

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(f"no batches of {self.global_batch_size} from {self.num_examples} examples")

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_examples // self.global_batch_size)

    @property
    def identity(self) -> list[object]:
        return ["examples", self.global_batch_size, self.seed, self.shuffle, self.group_lengths is not None]

    def epoch_of(self, step: int) -> int:
        """Epoch, from 0, that `step` belongs to."""
        return step // self.steps_per_epoch

    def examples_at(self, step: int) -> NDArray[np.int64]:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.global_batch_size
        last = min(first + self.global_batch_size, self.num_examples)
        slots = np.full(self.global_batch_size, EMPTY_SLOT, dtype=np.int64)
        slots[: last - first] = self._order(epoch)[first:last] if self.shuffle else np.arange(first, last)
        return slots

    def rows_at(self, step: int) -> Optional[Rows]:
        return None

    def consumed_examples(self, steps: int) -> int:
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.num_examples + rest * self.global_batch_size

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.group_lengths is None:
            return _epoch_order(self.num_examples, self.seed, epoch)
        return _grouped_order(self, epoch)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatchPlan:
    """Every epoch packed into rows of `row_length` tokens, and a step of `rows_per_step` of them.

    The rows of an epoch are as many whatever the epoch; which of equally long examples share a row, and in which
    order rows come, is drawn anew each time.
    """

    lengths: NDArray[np.int64]
    """Input tokens of each example."""
    row_length: int
    rows_per_step: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if len(self.lengths) < 1 or self.rows_per_step < 1:
            raise ValueError(f"no steps of {self.rows_per_step} rows from {len(self.lengths)} examples")

    @property
    def steps_per_epoch(self) -> int:
        return -(-_rows_per_epoch(self) // self.rows_per_step)

    @property
    def identity(self) -> list[object]:
        return ["tokens", self.row_length, self.rows_per_step, self.seed, self.shuffle]

    def examples_at(self, step: int) -> NDArray[np.int64]:
        return self.rows_at(step).items

    def rows_at(self, step: int) -> Rows:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self._rows(epoch)
        first = index * self.rows_per_step
        bounds = rows.offsets[first : min(first + self.rows_per_step, len(rows)) + 1]
        return Rows(rows.items[bounds[0] : bounds[-1]], bounds - bounds[0])

    def consumed_examples(self, steps: int) -> int:
        epochs, rest = divmod(steps, self.steps_per_epoch)
        seen = self._rows(epochs).offsets[rest * self.rows_per_step] if rest else 0
        return epochs * len(self.lengths) + int(seen)

    def _rows(self, epoch: int) -> Rows:
        return _epoch_rows(self, epoch if self.shuffle else 0)


def complete(slots: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """`slots` with empty ones behind them up to a multiple of `multiple`, at least one of it."""
    places = max(1, -(-len(slots) // multiple)) * multiple
    return np.concatenate([slots, np.full(places - len(slots), EMPTY_SLOT, dtype=np.int64)])


def rank_slice(slots: NDArray[np.int64], dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """The slots of one data parallel rank: every dp_size-th, so that empty slots are spread evenly."""
    if len(slots) % dp_size or not 0 <= dp_rank < dp_size:
        raise ValueError(f"{len(slots)} slots do not divide over rank {dp_rank} of {dp_size}")
    return slots[dp_rank::dp_size]


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = _permutation(num_examples, seed, epoch)
    order.setflags(write=False)
    return order


@lru_cache(maxsize=2)
def _grouped_order(plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
    """The epoch's permutation, sorted by length within windows, and the batches of all windows shuffled.

    The short batch, if there is one, is the permutation's tail and stays last: every step but the last is full.
    """
    assert plan.group_lengths is not None
    order = _permutation(plan.num_examples, plan.seed, epoch)
    size = plan.global_batch_size
    full = plan.num_examples // size
    head = order[: full * size]
    window = np.arange(len(head)) // (size * _WINDOW_BATCHES)
    head = head[np.lexsort((plan.group_lengths[head], window))]
    batches = head.reshape(full, size)[_permutation(full, plan.seed, epoch, stream=1)]
    grouped = np.concatenate([batches.ravel(), order[full * size :]])
    grouped.setflags(write=False)
    return grouped


@lru_cache(maxsize=4)
def _epoch_rows(plan: TokenBatchPlan, epoch: int) -> Rows:
    if plan.shuffle:
        order = _permutation(len(plan.lengths), plan.seed, epoch)
        rows = best_fit_decreasing(plan.lengths, plan.row_length, order)
        return _reordered(rows, _permutation(len(rows), plan.seed, epoch, stream=1))
    # Rows are made by length; the order of the files is kept as far as they allow, by each row's first example.
    rows = best_fit_decreasing(plan.lengths, plan.row_length)
    return _reordered(rows, np.argsort(_first_examples(rows), kind="stable"))


@lru_cache(maxsize=16)
def _rows_per_epoch(plan: TokenBatchPlan) -> int:
    return len(_epoch_rows(plan, 0))


def _first_examples(rows: Rows) -> NDArray[np.int64]:
    return np.minimum.reduceat(rows.items, rows.offsets[:-1])


def _reordered(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """The same rows in another order."""
    sizes = np.diff(rows.offsets)[order]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    shift = np.repeat(rows.offsets[:-1][order] - offsets[:-1], sizes)
    return Rows(rows.items[np.arange(len(rows.items)) + shift], offsets)


def _permutation(count: int, seed: int, epoch: int, stream: int = 0) -> NDArray[np.int64]:
    """A permutation that depends on nothing but its arguments.

    numpy keeps the raw stream of a bit generator the same in all versions, which it does not promise for
    Generator.permutation; a run that is resumed after an upgrade must go on in the same order.
    """
    entropy = [seed % 2**64, epoch, *([stream] if stream else [])]
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
