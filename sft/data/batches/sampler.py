"""Choose the examples of each optimizer step, as a pure function of the step.

A schedule knows nothing about ranks: it says which examples a global batch holds, and each rank takes its share. So a
run can be resumed with another data parallel size and still sees every example once an epoch, or as often as a mixture
says (sft.data.batches.mixture). There is no state to save: resuming is asking for another step.

A global batch is counted in examples (`ExampleSchedule`) or in tokens (`TokenSchedule`). Neither depends on packing: a
run with packing on or off takes the same examples in the same steps and computes the same gradients.

Rejected: torch's DistributedSampler (its order depends on the number of ranks, and its position is lost on resume),
dropping the last short batch (some data would never be seen), and filling it from the beginning (some would be seen
twice).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from launcher.contract.divisors import rounded_up
from launcher.contract.steps import share_of_steps
from sft.data.batches.mixture import Mixture, permutation
from sft.data.batches.packing import Rows, best_fit_decreasing

EMPTY_SLOT = -1
"""Stands in a slot of the global batch that holds no example."""
_WINDOW_BATCHES = 64
"""Global batches whose examples are sorted together by `group_by_length`. Enough for batches of nearly equal lengths,
few enough that chance still decides which examples meet in a batch."""


class BatchSchedule(Protocol):
    """Says which examples each step holds."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch, and of all others unless a mixture varies. The last step may be short."""
        ...

    def steps_in(self, epochs: float) -> int:
        """Return the number of steps of the first `epochs` epochs, those of a part of an epoch rounded up."""
        ...

    def examples_at(self, step: int) -> NDArray[np.int64]:
        """Return the example ids of the whole global batch of `step` (from 0), EMPTY_SLOT in slots without one."""
        ...

    def rows_at(self, step: int) -> Rows | None:
        """Return the rows in which the step's examples must be packed, None where the schedule does not say."""
        ...

    def consumed_examples(self, steps: int) -> int:
        """Return the number of examples seen in the first `steps` steps."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class ExampleSchedule:
    """The examples in an order given by `seed`, cut into global batches of equally many examples."""

    num_examples: int
    """Examples in the data."""
    global_batch_size: int
    seed: int
    shuffle: bool
    mixture: Mixture | None = None
    """How often an epoch takes each example. None: once."""
    group_lengths: NDArray[np.int64] | None = None
    """Length of each example, to make batches of similar lengths. None: lengths do not matter."""

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(f"no batches of {self.global_batch_size} from {self.num_examples} examples")

    @property
    def epoch_size(self) -> int:
        """Examples that an epoch takes, repeated ones counted again."""
        return self.num_examples if self.mixture is None else self.mixture.size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch_size // self.global_batch_size)

    def steps_in(self, epochs: float) -> int:
        return share_of_steps(epochs, self.steps_per_epoch)

    def examples_at(self, step: int) -> NDArray[np.int64]:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        first = index * self.global_batch_size
        last = min(first + self.global_batch_size, self.epoch_size)
        slots = np.full(self.global_batch_size, EMPTY_SLOT, dtype=np.int64)
        places = self._order(epoch)[first:last] if self.shuffle else np.arange(first, last)
        slots[: last - first] = _examples(self.mixture, epoch, places)
        return slots

    def rows_at(self, step: int) -> Rows | None:
        return None

    def consumed_examples(self, steps: int) -> int:
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.epoch_size + rest * self.global_batch_size

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.group_lengths is None:
            return _epoch_order(self.epoch_size, self.seed, epoch)
        return _grouped_order(self, epoch)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSchedule:
    """Each epoch packed into rows of `row_length` tokens, and steps of `rows_per_step` rows.

    With `shuffle`, each epoch chooses anew which of equally long examples share a row, and the order of the rows. The
    number of rows depends on the lengths alone, so all epochs have as many, unless a mixture takes different examples
    in each. Then finding a step means packing all epochs before it: some seconds an epoch for 10 million examples.
    """

    lengths: NDArray[np.int64]
    """Input tokens of each example."""
    row_length: int
    rows_per_step: int
    seed: int
    shuffle: bool
    mixture: Mixture | None = None
    """How often an epoch takes each example. None: once."""

    def __post_init__(self) -> None:
        if len(self.lengths) < 1 or self.rows_per_step < 1:
            raise ValueError(f"no steps of {self.rows_per_step} rows from {len(self.lengths)} examples")

    @property
    def epoch_size(self) -> int:
        """Examples that an epoch takes, repeated ones counted again."""
        return len(self.lengths) if self.mixture is None else self.mixture.size

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_of(0)

    def steps_in(self, epochs: float) -> int:
        if not self._varies:
            return share_of_steps(epochs, self.steps_per_epoch)
        whole = math.floor(epochs)
        last = share_of_steps(epochs, self._steps_of(whole)) - whole * self._steps_of(whole)
        return sum(map(self._steps_of, range(whole))) + last

    def examples_at(self, step: int) -> NDArray[np.int64]:
        return self.rows_at(step).items

    def rows_at(self, step: int) -> Rows:
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = self._place(step)
        rows = self._rows(epoch)
        first = index * self.rows_per_step
        bounds = rows.offsets[first : min(first + self.rows_per_step, len(rows)) + 1]
        return Rows(rows.items[bounds[0] : bounds[-1]], bounds - bounds[0])

    def consumed_examples(self, steps: int) -> int:
        if steps == 0:
            return 0
        # From the last of these steps, not the one after it, which may be in an epoch that is not packed yet.
        epoch, index = self._place(steps - 1)
        rows = self._rows(epoch)
        return epoch * self.epoch_size + int(rows.offsets[min((index + 1) * self.rows_per_step, len(rows))])

    @property
    def _varies(self) -> bool:
        return self.mixture is not None and self.mixture.varies

    def _place(self, step: int) -> tuple[int, int]:
        """Return the epoch of a step, and the step's number within it."""
        if not self._varies:
            return divmod(step, self.steps_per_epoch)
        epoch = 0
        while step >= self._steps_of(epoch):
            step -= self._steps_of(epoch)
            epoch += 1
        return epoch, step

    def _steps_of(self, epoch: int) -> int:
        return -(-_rows_of_epoch(self, epoch if self._varies else 0) // self.rows_per_step)

    def _rows(self, epoch: int) -> Rows:
        # Epochs that are all alike share the cache entry of the first.
        return _epoch_rows(self, epoch if self.shuffle or self._varies else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class CyclicSchedule:
    """The order of trlx's NeMo trainers (sft.compat.trlx.ShuffledCyclicSequence), cut into global batches.

    One permutation covers the whole run, so a run with another number of steps has another order from the start.
    """

    num_examples: int
    global_batch_size: int
    max_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.max_steps

    def steps_in(self, epochs: float) -> int:
        return share_of_steps(epochs, self.max_steps)

    def examples_at(self, step: int) -> NDArray[np.int64]:
        if not 0 <= step < self.max_steps:
            raise ValueError(f"step {step} is not in a run of {self.max_steps} steps")
        first = step * self.global_batch_size
        return self._order[first : first + self.global_batch_size] % self.num_examples

    def rows_at(self, step: int) -> Rows | None:
        return None

    def consumed_examples(self, steps: int) -> int:
        return steps * self.global_batch_size

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return cyclic_order(self.global_batch_size * self.max_steps, self.seed)


def cyclic_order(count: int, seed: int) -> NDArray[np.int64]:
    """Return torch's random permutation of `count` places, which trlx uses. numpy's would differ."""
    import torch  # slow to import, for prepare, which counts steps alone

    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


def complete(slots: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    """Return `slots` padded with EMPTY_SLOT to a multiple of `multiple` greater than 0."""
    places = rounded_up(max(1, len(slots)), multiple)
    return np.concatenate([slots, np.full(places - len(slots), EMPTY_SLOT, dtype=np.int64)])


def rank_slice(slots: NDArray[np.int64], dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """Return the slots of one data parallel rank."""
    # Every dp_size-th, so that the empty slots at the end are spread evenly over ranks.
    if len(slots) % dp_size or not 0 <= dp_rank < dp_size:
        raise ValueError(f"{len(slots)} slots do not divide over rank {dp_rank} of {dp_size}")
    return slots[dp_rank::dp_size]


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    order = _permutation(num_examples, seed, epoch)
    order.setflags(write=False)
    return order


def _examples(mixture: Mixture | None, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the example ids at these places of an epoch."""
    return places if mixture is None else mixture.examples(epoch, places)


@lru_cache(maxsize=2)
def _grouped_order(schedule: ExampleSchedule, epoch: int) -> NDArray[np.int64]:
    """Return the epoch's permutation sorted by length within windows, with the batches of all windows shuffled.

    A short batch, if there is one, is the permutation's tail and stays last, so every step but the last is full.
    """
    assert schedule.group_lengths is not None
    order = _permutation(schedule.epoch_size, schedule.seed, epoch)
    size = schedule.global_batch_size
    full = schedule.epoch_size // size
    head = order[: full * size]
    window = np.arange(len(head)) // (size * _WINDOW_BATCHES)
    head = head[np.lexsort((schedule.group_lengths[_examples(schedule.mixture, epoch, head)], window))]
    batches = head.reshape(full, size)[_permutation(full, schedule.seed, epoch, stream=1)]
    grouped = np.concatenate([batches.ravel(), order[full * size :]])
    grouped.setflags(write=False)
    return grouped


@lru_cache(maxsize=4)  # packing takes seconds, and steps of an epoch ask for it one after the other
def _epoch_rows(schedule: TokenSchedule, epoch: int) -> Rows:
    examples = _epoch_examples(schedule, epoch)
    lengths = schedule.lengths[examples]
    if schedule.shuffle:
        rows = best_fit_decreasing(lengths, schedule.row_length, _permutation(len(lengths), schedule.seed, epoch))
        order = _permutation(len(rows), schedule.seed, epoch, stream=1)
    else:
        # Packing goes by length. Ordering rows by their first example keeps the order of the files as far as possible.
        rows = best_fit_decreasing(lengths, schedule.row_length)
        order = np.argsort(np.minimum.reduceat(rows.items, rows.offsets[:-1]), kind="stable")
    ordered = _reordered(rows, order)
    return Rows(examples[ordered.items], ordered.offsets)


@lru_cache(maxsize=4096)
def _rows_of_epoch(schedule: TokenSchedule, epoch: int) -> int:
    """Return the number of rows of an epoch, which depends on the lengths alone."""
    if epoch == 0:
        return len(_epoch_rows(schedule, 0))  # needed in any case, so it may as well be cached
    return len(best_fit_decreasing(schedule.lengths[_epoch_examples(schedule, epoch)], schedule.row_length))


def _epoch_examples(schedule: TokenSchedule, epoch: int) -> NDArray[np.int64]:
    return _examples(schedule.mixture, epoch, np.arange(schedule.epoch_size, dtype=np.int64))


def _reordered(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """Return the same rows in another order."""
    sizes = np.diff(rows.offsets)[order]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    shift = np.repeat(rows.offsets[:-1][order] - offsets[:-1], sizes)
    return Rows(rows.items[np.arange(len(rows.items)) + shift], offsets)


def _permutation(count: int, seed: int, epoch: int, stream: int = 0) -> NDArray[np.int64]:
    return permutation(count, [seed % 2**64, epoch, *([stream] if stream else [])])
