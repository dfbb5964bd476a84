"""Which examples belong to which optimizer step, as a pure function of the step.

A plan knows nothing of ranks: it says which examples a global batch holds, and a rank then takes its share. So a
run may stop, and go on with another data parallel size, and still sees every example once an epoch, or as often as a
mixture says (sft.data.batches.mixture). There is no state to save: to resume is to ask for another step.

The global batch is counted in examples (`BatchPlan`) or in tokens (`TokenBatchPlan`). Neither asks whether rows are
packed: the same run with packing on or off takes the same examples in the same steps, and so the same gradients.

Rejected: torch's DistributedSampler (its order depends on the number of ranks and its position is lost on resume),
dropping the last short batch (data that is never seen), and wrapping it around (data that is seen twice).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Optional, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from sft.data.batches.mixture import Mixture, permutation
from sft.data.batches.packing import Rows, best_fit_decreasing

EMPTY_SLOT = -1
"""Marks a place of the global batch that holds no example."""
_WINDOW_BATCHES = 64
"""Global batches whose examples are sorted together by `group_by_length`: enough for batches of nearly equal lengths,
few enough that which examples meet in a batch is still a matter of the shuffle."""


class StepPlan(Protocol):
    """Which examples each step holds."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch, and of every other that takes the same examples; the last one may be short."""
        ...

    @property
    def identity(self) -> dict[str, object]:
        """What, beside the data themselves, decides the sequence of global batches, by the key of the config."""
        ...

    def steps_in(self, epochs: int) -> int:
        """Steps of the first `epochs` epochs."""
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
    """Examples that there are."""
    global_batch_size: int
    seed: int
    shuffle: bool
    mixture: Optional[Mixture] = None
    """What an epoch takes of them; None takes each once."""
    group_lengths: Optional[NDArray[np.int64]] = None
    """Length of each example where batches are to be of similar lengths; None leaves the order alone."""

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(f"no batches of {self.global_batch_size} from {self.num_examples} examples")

    @property
    def epoch_size(self) -> int:
        """Places of an epoch."""
        return self.num_examples if self.mixture is None else self.mixture.size

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.epoch_size // self.global_batch_size)

    @property
    def identity(self) -> dict[str, object]:
        return {
            "train.global_batch_unit": "examples",
            "train.global_batch_size": self.global_batch_size,
            "train.seed": self.seed,
            "data.shuffle": self.shuffle,
            "data.group_by_length": self.group_lengths is not None,
            **_mixed(self.mixture),
        }

    def steps_in(self, epochs: int) -> int:
        return epochs * self.steps_per_epoch

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

    def rows_at(self, step: int) -> Optional[Rows]:
        return None

    def consumed_examples(self, steps: int) -> int:
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.epoch_size + rest * self.global_batch_size

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self.group_lengths is None:
            return _epoch_order(self.epoch_size, self.seed, epoch)
        return _grouped_order(self, epoch)


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatchPlan:
    """Every epoch packed into rows of `row_length` tokens, and a step of `rows_per_step` of them.

    Which of equally long examples share a row, and in which order rows come, is drawn anew each time. The rows of an
    epoch are as many whatever the epoch, unless a mixture takes other examples: then the epochs before a step have to
    be packed as well to know where it is, 10 million examples in some seconds an epoch.
    """

    lengths: NDArray[np.int64]
    """Input tokens of each example."""
    row_length: int
    rows_per_step: int
    seed: int
    shuffle: bool
    mixture: Optional[Mixture] = None
    """What an epoch takes of the examples; None takes each once."""

    def __post_init__(self) -> None:
        if len(self.lengths) < 1 or self.rows_per_step < 1:
            raise ValueError(f"no steps of {self.rows_per_step} rows from {len(self.lengths)} examples")

    @property
    def epoch_size(self) -> int:
        """Examples of an epoch."""
        return len(self.lengths) if self.mixture is None else self.mixture.size

    @property
    def steps_per_epoch(self) -> int:
        return self._steps_of(0)

    @property
    def identity(self) -> dict[str, object]:
        return {
            "train.global_batch_unit": "tokens",
            "train.global_batch_size": self.rows_per_step * self.row_length,
            "data.seq_length": self.row_length,
            "train.seed": self.seed,
            "data.shuffle": self.shuffle,
            **_mixed(self.mixture),
        }

    def steps_in(self, epochs: int) -> int:
        return sum(map(self._steps_of, range(epochs))) if self._varies else epochs * self.steps_per_epoch

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
        # Asked about the last step and not the next, which may be of an epoch that nobody has to pack yet.
        epoch, index = self._place(steps - 1)
        rows = self._rows(epoch)
        return epoch * self.epoch_size + int(rows.offsets[min((index + 1) * self.rows_per_step, len(rows))])

    @property
    def _varies(self) -> bool:
        return self.mixture is not None and self.mixture.varies

    def _place(self, step: int) -> tuple[int, int]:
        """Epoch of a step, and its place there."""
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
        return _epoch_rows(self, epoch if self.shuffle or self._varies else 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class CyclicPlan:
    """The order of trlx's NeMo trainers (sft.compat.trlx.ShuffledCyclicSequence), cut into global batches.

    One permutation covers the whole run, and its length is part of what it is: a longer run is another one.
    """

    num_examples: int
    global_batch_size: int
    max_steps: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return self.max_steps

    @property
    def identity(self) -> dict[str, object]:
        return {
            "train.global_batch_size": self.global_batch_size,
            "train.max_steps": self.max_steps,
            "data.cyclic_seed": self.seed,
        }

    def steps_in(self, epochs: int) -> int:
        return epochs * self.max_steps

    def examples_at(self, step: int) -> NDArray[np.int64]:
        if not 0 <= step < self.max_steps:
            raise ValueError(f"step {step} is not one of {self.max_steps}")
        first = step * self.global_batch_size
        return self._order[first : first + self.global_batch_size] % self.num_examples

    def rows_at(self, step: int) -> Optional[Rows]:
        return None

    def consumed_examples(self, steps: int) -> int:
        return steps * self.global_batch_size

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return cyclic_order(self.global_batch_size * self.max_steps, self.seed)


def cyclic_order(count: int, seed: int) -> NDArray[np.int64]:
    """torch's permutation of `count` places: numpy's is another."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).numpy()


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


def _examples(mixture: Optional[Mixture], epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
    """Example ids in these places of an epoch."""
    return places if mixture is None else mixture.examples(epoch, places)


def _mixed(mixture: Optional[Mixture]) -> dict[str, object]:
    """What of a mixture decides the batches, beside the examples of its sources."""
    shares = () if mixture is None else mixture.shares
    weights: dict[str, object] = {f"data.sources.{share.name}.weight": share.weight for share in shares}
    return {**weights, "order of data.sources": [share.name for share in shares]} if shares else {}


@lru_cache(maxsize=2)
def _grouped_order(plan: BatchPlan, epoch: int) -> NDArray[np.int64]:
    """The epoch's permutation, sorted by length within windows, and the batches of all windows shuffled.

    The short batch, if there is one, is the permutation's tail and stays last: every step but the last is full.
    """
    assert plan.group_lengths is not None
    order = _permutation(plan.epoch_size, plan.seed, epoch)
    size = plan.global_batch_size
    full = plan.epoch_size // size
    head = order[: full * size]
    window = np.arange(len(head)) // (size * _WINDOW_BATCHES)
    head = head[np.lexsort((plan.group_lengths[_examples(plan.mixture, epoch, head)], window))]
    batches = head.reshape(full, size)[_permutation(full, plan.seed, epoch, stream=1)]
    grouped = np.concatenate([batches.ravel(), order[full * size :]])
    grouped.setflags(write=False)
    return grouped


@lru_cache(maxsize=4)
def _epoch_rows(plan: TokenBatchPlan, epoch: int) -> Rows:
    examples = _epoch_examples(plan, epoch)
    lengths = plan.lengths[examples]
    if plan.shuffle:
        rows = best_fit_decreasing(lengths, plan.row_length, _permutation(len(lengths), plan.seed, epoch))
        order = _permutation(len(rows), plan.seed, epoch, stream=1)
    else:
        # Rows are made by length; the order of the files is kept as far as they allow, by each row's first place.
        rows = best_fit_decreasing(lengths, plan.row_length)
        order = np.argsort(np.minimum.reduceat(rows.items, rows.offsets[:-1]), kind="stable")
    ordered = _reordered(rows, order)
    return Rows(examples[ordered.items], ordered.offsets)


@lru_cache(maxsize=4096)
def _rows_of_epoch(plan: TokenBatchPlan, epoch: int) -> int:
    """How many rows; their number depends on the lengths alone."""
    if epoch == 0:
        return len(_epoch_rows(plan, 0))  # they are wanted in any case
    return len(best_fit_decreasing(plan.lengths[_epoch_examples(plan, epoch)], plan.row_length))


def _epoch_examples(plan: TokenBatchPlan, epoch: int) -> NDArray[np.int64]:
    return _examples(plan.mixture, epoch, np.arange(plan.epoch_size, dtype=np.int64))


def _reordered(rows: Rows, order: NDArray[np.int64]) -> Rows:
    """The same rows in another order."""
    sizes = np.diff(rows.offsets)[order]
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])
    shift = np.repeat(rows.offsets[:-1][order] - offsets[:-1], sizes)
    return Rows(rows.items[np.arange(len(rows.items)) + shift], offsets)


def _permutation(count: int, seed: int, epoch: int, stream: int = 0) -> NDArray[np.int64]:
    return permutation(count, [seed % 2**64, epoch, *([stream] if stream else [])])
