"""The batch of one optimizer step on one rank: micro-batches and the numbers of the global batch.

Every number that belongs to the whole global batch (its weight above all, by which the loss is divided) is computed
by each rank from the cache's own index. No rank has to ask another, and no two can disagree.

A micro-batch is either rows with one example each, padded behind it, or (`data.packing`) one row of many examples
with the places where they begin; several packed rows of a micro-batch lie one behind the other as one. Padding behind
a packed row belongs to no example: it is cut into sequences of its own, short ones, so that it costs next to nothing in
attention.

What is padding follows from stored lengths and is expressed in weights alone. Token ids never decide: in many
tokenizers the padding token is the end token, which must keep its weight.

All micro-batches of a rank in a step have one shape, because pipeline stages exchange tensors of a fixed shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Optional

import numpy as np
import torch
from numpy.typing import NDArray

from sft.data.batches.context_slice import ContextShare, share_rows
from sft.data.batches.packing import EMPTY_ROW, Rows, assign_rows, pack_step, row_cost
from sft.data.batches.sampler import EMPTY_SLOT, StepPlan, complete, rank_slice
from sft.data.cache.store import Examples

_PADDING_SEQUENCE = 128
"""Longest sequence that padding is cut into: the tile of attention kernels, below which nothing is saved."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """Which part of a global batch a rank computes, and in what form."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    """Rows of a micro-batch; packed ones are joined."""
    pad_to_multiple: int = 1
    sequence_multiple: int = 1
    """What the topology asks of a row's length (Topology.sequence_multiple)."""
    micro_batch_multiple: int = 1
    """What the topology asks of the number of micro-batches (Topology.micro_batch_multiple)."""
    row_length: Optional[int] = None
    """Most tokens of a packed row; None gives each example a row of its own."""
    cp_rank: int = 0
    cp_size: int = 1
    """Ranks that share each row."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Input of one forward pass; tensors but cu_seqlens are [micro_batch_size, row length]."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The token after each token in its example; 0 where there is none."""
    loss_weights: torch.Tensor
    """Weight of each label in the loss; 0 on padding and on empty slots."""
    position_ids: torch.Tensor
    """Place of each token in its own sequence."""
    supervised: Optional[torch.Tensor] = None
    """Where loss_weights is not 0, in the order of hidden states: index position * rows + row. Known on the host, so
    that no step waits for the device to count them."""
    cu_seqlens: Optional[torch.Tensor] = None
    """int32: where the sequences of a packed row begin, and its end; None without packing."""
    seq_lengths: Optional[tuple[int, ...]] = None
    """Lengths of the same sequences, padding last. On the host, so that no step waits for the device to know them."""
    context_share: Optional[ContextShare] = None
    """What this context parallel rank computes of the rows; None where it computes all."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MicroBatch:
        """This micro-batch on `device`."""
        return replace(
            self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        )

    def pin_memory(self) -> MicroBatch:
        """This micro-batch in page-locked memory; Lightning and DataLoader call it by this name."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor | ContextShare)}

    def own_part(self) -> MicroBatch:
        """What this context parallel rank computes of it; cu_seqlens and seq_lengths stay those of whole rows."""
        share = self.context_share
        if share is None:
            return self
        whole = {name: getattr(self, name) for name in ("tokens", "labels", "loss_weights", "position_ids")}
        parts: dict[str, Any] = {name: share.part_of(rows) for name, rows in whole.items()}
        return replace(self, **parts, supervised=share.supervised)


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
    squared_lengths: int
    """Sum over the examples of their input tokens squared, which the cost of attention follows."""
    supervised_tokens: int
    """Targets with a weight other than 0."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> StepBatch:
        """This batch on `device`."""
        moved = tuple(batch.to(device, non_blocking=non_blocking) for batch in self.micro_batches)
        return replace(self, micro_batches=moved)

    def pin_memory(self) -> StepBatch:
        """This batch in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))


def collate(cache: Examples, plan: StepPlan, step: int, share: RankShare) -> StepBatch:
    """The batch of `step` for one data parallel rank."""
    slots = plan.examples_at(step)
    examples = slots[slots != EMPTY_SLOT]
    lengths = cache.lengths
    rows = _padded_rows(slots, share) if share.row_length is None else _packed_rows(plan, step, lengths, share)
    longest = max((int((lengths[row] - 1).sum()) for batch in rows for row in batch), default=1)
    multiple = math.lcm(share.pad_to_multiple, share.sequence_multiple)
    padded = -(-max(longest, 1) // multiple) * multiple
    return StepBatch(
        micro_batches=tuple(_micro_batch(cache, batch, padded, share) for batch in rows),
        step=step,
        global_weight=float(cache.target_weights[examples].sum()),
        examples=len(examples),
        tokens=int((lengths[examples] - 1).sum()),
        squared_lengths=int(np.square(lengths[examples].astype(np.int64) - 1).sum()),
        supervised_tokens=int(cache.supervised[examples].sum()),
    )


Row = NDArray[np.int64]
"""The examples of one row."""


def _padded_rows(slots: NDArray[np.int64], share: RankShare) -> list[list[Row]]:
    """Micro-batches of rows with one example each, or none."""
    slots = complete(slots, share.dp_size * share.micro_batch_size * share.micro_batch_multiple)
    mine = [slot[slot != EMPTY_SLOT] for slot in rank_slice(slots, share.dp_rank, share.dp_size)[:, None]]
    size = share.micro_batch_size
    return [mine[first : first + size] for first in range(0, len(mine), size)]


def _packed_rows(plan: StepPlan, step: int, lengths: NDArray[np.int64], share: RankShare) -> list[list[Row]]:
    """Micro-batches of one row of examples each, or none."""
    assert share.row_length is not None
    multiple = share.micro_batch_multiple * share.micro_batch_size
    slots = plan.examples_at(step)
    examples = slots[slots != EMPTY_SLOT]
    planned = plan.rows_at(step)
    if planned is not None:
        planned = Rows(np.arange(len(examples)), planned.offsets)
    found = pack_step(lengths[examples] - 1, share.row_length, share.dp_size, multiple, planned)
    packed = [examples[row] for row in found]
    table = assign_rows([row_cost(lengths[row] - 1) for row in packed], share.dp_size, multiple)
    nothing = np.zeros(0, dtype=np.int64)
    mine = [nothing if row == EMPTY_ROW else packed[row] for row in table[share.dp_rank].tolist()]
    size = share.micro_batch_size
    return [[_joined(mine[first : first + size], lengths)] for first in range(0, len(mine), size)]


def _joined(rows: Sequence[Row], lengths: NDArray[np.int64]) -> Row:
    """Packed rows as one, its longest example first, which attention kernels make use of."""
    if len(rows) == 1:
        return rows[0]
    examples = np.concatenate(rows)
    return examples[np.argsort(-lengths[examples], kind="stable")]


def _micro_batch(cache: Examples, rows: Sequence[Row], padded: int, share: RankShare) -> MicroBatch:
    """Rows of `padded` length. An example of n tokens gives n - 1 inputs: its last token is only ever a target."""
    shape = (len(rows), padded)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)  # stays 0 on padding, which may be longer than a model's positions
    seq_lengths: list[int] = []
    for row, examples in enumerate(rows):
        start = 0
        for example in examples.tolist():
            ids, weights = cache.tokens(example)
            count = len(ids) - 1
            place = slice(start, start + count)
            tokens[row, place] = ids[:-1]
            labels[row, place] = ids[1:]
            loss_weights[row, place] = weights[1:]
            positions[row, place] = np.arange(count)
            seq_lengths.append(count)
            start += count
    packed = share.row_length is not None
    if packed:
        seq_lengths += _padding(padded - sum(seq_lengths))
    own = None
    if share.cp_size > 1:
        own = share_rows(loss_weights, seq_lengths if packed else None, share.cp_rank, share.cp_size)
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        labels=torch.from_numpy(labels),
        loss_weights=torch.from_numpy(loss_weights),
        position_ids=torch.from_numpy(positions),
        supervised=torch.from_numpy(np.flatnonzero(loss_weights.T)),
        cu_seqlens=torch.tensor(np.cumsum([0, *seq_lengths]), dtype=torch.int32) if packed else None,
        seq_lengths=tuple(seq_lengths) if packed else None,
        context_share=own,
    )


def _padding(count: int) -> list[int]:
    """`count` tokens of padding as sequences of their own."""
    whole, rest = divmod(count, _PADDING_SEQUENCE)
    return [_PADDING_SEQUENCE] * whole + [rest] * (rest > 0)
