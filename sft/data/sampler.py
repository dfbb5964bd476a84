"""Which examples belong to which optimizer step, as a pure function of the step.

A plan knows nothing of ranks: it says which examples a global batch holds, and a rank then takes its share. So a
run may stop, and go on with another data parallel size, and still sees every example once an epoch. There is no
state to save: to resume is to ask for another step.

Rejected: torch's DistributedSampler (its order depends on the number of ranks and its position is lost on resume),
dropping the last short batch (data that is never seen), and wrapping it around (data that is seen twice).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

EMPTY_SLOT = -1
"""Marks a place of the global batch that holds no example."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchPlan:
    """The order of examples for `seed`, cut into global batches."""

    num_examples: int
    global_batch_size: int
    seed: int
    shuffle: bool

    def __post_init__(self) -> None:
        if self.num_examples < 1 or self.global_batch_size < 1:
            raise ValueError(f"no batches of {self.global_batch_size} from {self.num_examples} examples")

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which every example is seen once; the last one may be short of examples."""
        return -(-self.num_examples // self.global_batch_size)

    def epoch_of(self, step: int) -> int:
        """Epoch, from 0, that `step` belongs to."""
        return step // self.steps_per_epoch

    def examples_at(self, step: int) -> NDArray[np.int64]:
        """Example ids of the whole global batch of `step` (from 0), EMPTY_SLOT where there is none."""
        if step < 0:
            raise ValueError(f"step {step} is negative")
        epoch, index = divmod(step, self.steps_per_epoch)
        order = _epoch_order(self.num_examples, self.seed, epoch) if self.shuffle else None
        first = index * self.global_batch_size
        last = min(first + self.global_batch_size, self.num_examples)
        slots = np.full(self.global_batch_size, EMPTY_SLOT, dtype=np.int64)
        slots[: last - first] = np.arange(first, last) if order is None else order[first:last]
        return slots

    def consumed_examples(self, steps: int) -> int:
        """Examples seen in the first `steps` steps."""
        epochs, rest = divmod(steps, self.steps_per_epoch)
        return epochs * self.num_examples + rest * self.global_batch_size


def rank_slice(slots: NDArray[np.int64], dp_rank: int, dp_size: int) -> NDArray[np.int64]:
    """The slots of one data parallel rank: every dp_size-th, so that empty slots are spread evenly."""
    if len(slots) % dp_size or not 0 <= dp_rank < dp_size:
        raise ValueError(f"{len(slots)} slots do not divide over rank {dp_rank} of {dp_size}")
    return slots[dp_rank::dp_size]


@lru_cache(maxsize=2)
def _epoch_order(num_examples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation that depends on nothing but its arguments.

    numpy keeps the raw stream of a bit generator the same in all versions, which it does not promise for
    Generator.permutation; a run that is resumed after an upgrade must go on in the same order.
    """
    stream = np.random.PCG64(np.random.SeedSequence([seed % 2**64, epoch]))
    order = np.argsort(stream.random_raw(num_examples), kind="stable").astype(np.int64, copy=False)
    order.setflags(write=False)
    return order
