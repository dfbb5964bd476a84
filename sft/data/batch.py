"""The batch of one optimizer step on one rank: padded micro-batches and the numbers of the global batch.

Every number that belongs to the whole global batch (its weight above all, by which the loss is divided) is computed
by each rank from the cache's own index. No rank has to ask another, and no two can disagree.

What is padding follows from stored lengths and is expressed in weights alone. Token ids never decide: in many
tokenizers the padding token is the end token, which must keep its weight.

All micro-batches of a rank in a step have one shape, because pipeline stages exchange tensors of a fixed shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Optional

import numpy as np
import torch
from numpy.typing import NDArray

from sft.data.cache import TokenCache
from sft.data.sampler import EMPTY_SLOT, BatchPlan, rank_slice


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Input of one forward pass; all tensors are [micro_batch_size, padded length]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The token after each token; 0 where there is none."""
    loss_weights: torch.Tensor
    """Weight of each label in the loss; 0 on padding and on empty slots."""
    position_ids: torch.Tensor
    cu_seqlens: Optional[torch.Tensor] = None
    """Where sequences begin when several share a row; None in padded batches."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MicroBatch:
        """This micro-batch on `device`."""
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        return MicroBatch(**moved)

    def pin_memory(self) -> MicroBatch:
        """This micro-batch in page-locked memory; Lightning and DataLoader call it by this name."""
        return MicroBatch(**{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, torch.Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank needs for one optimizer step. The numbers describe the global batch, over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    step: int
    global_weight: float
    """Sum of the target weights of the global batch: what the summed loss is divided by."""
    examples: int
    """Slots that hold an example."""
    tokens: int
    """Input tokens, padding not counted."""
    supervised_tokens: int
    """Targets with a weight other than 0."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> StepBatch:
        """This batch on `device`."""
        moved = tuple(batch.to(device, non_blocking=non_blocking) for batch in self.micro_batches)
        return replace(self, micro_batches=moved)

    def pin_memory(self) -> StepBatch:
        """This batch in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))


def collate(
    cache: TokenCache,
    plan: BatchPlan,
    step: int,
    *,
    dp_rank: int,
    dp_size: int,
    micro_batch_size: int,
    pad_to_multiple: int = 1,
    sequence_multiple: int = 1,
) -> StepBatch:
    """The batch of `step` for one data parallel rank.

    `sequence_multiple` is what the topology asks of a sequence's length (Topology.sequence_multiple).
    """
    slots = plan.examples_at(step)
    mine = rank_slice(slots, dp_rank, dp_size)
    if len(mine) % micro_batch_size:
        raise ValueError(f"{len(mine)} examples a rank do not divide into micro-batches of {micro_batch_size}")
    present = slots[slots != EMPTY_SLOT]
    lengths = cache.lengths
    longest = max((int(lengths[i]) - 1 for i in mine if i != EMPTY_SLOT), default=1)
    multiple = math.lcm(pad_to_multiple, sequence_multiple)
    padded = -(-longest // multiple) * multiple
    groups = mine.reshape(-1, micro_batch_size)
    return StepBatch(
        micro_batches=tuple(_pad(cache, group, padded) for group in groups),
        step=step,
        global_weight=float(cache.target_weights[present].sum()),
        examples=len(present),
        tokens=int(lengths[present].sum()) - len(present),
        supervised_tokens=int(cache.supervised[present].sum()),
    )


def _pad(cache: TokenCache, slots: NDArray[np.int64], padded: int) -> MicroBatch:
    """Rows of `padded` length. An example of n tokens gives n - 1 inputs: its last token is only ever a target."""
    shape = (len(slots), padded)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    for row, example in enumerate(slots):
        if example == EMPTY_SLOT:
            continue
        ids, weights = cache.tokens(int(example))
        count = len(ids) - 1
        tokens[row, :count] = ids[:-1]
        labels[row, :count] = ids[1:]
        loss_weights[row, :count] = weights[1:]
    positions = np.broadcast_to(np.arange(padded, dtype=np.int64), shape).copy()
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        position_ids=torch.from_numpy(positions),
    )
