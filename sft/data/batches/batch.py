"""Build the batch of one optimizer step on one rank: its micro-batches, and the numbers of the global batch.

Each rank computes the numbers of the whole global batch (above all its weight, by which the loss is divided) from the
cache's index. Ranks need not communicate and cannot disagree.

A micro-batch has either rows of one example each, padded at the end, or (`data.packing`) one row of many examples and
the offsets where they begin. The packed rows of a micro-batch are concatenated to one.

Padding follows from stored lengths and shows in weights alone. Token ids never decide what is padding: many tokenizers
use the end token for padding, and the end token must keep its weight.

All micro-batches of a rank in a step have the same shape, because pipeline stages exchange tensors of a fixed shape.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from launcher.contract.divisors import rounded_up
from sft.data.batches.context_slice import ContextShare, share_rows
from sft.data.batches.packing import EMPTY_ROW, Rows, assign_rows, pack_step, row_cost
from sft.data.batches.sampler import EMPTY_SLOT, BatchSchedule, complete, rank_slice
from sft.data.cache.store import Examples

_PADDING_SEQUENCE = 128
"""Padding of a packed row is cut into sequences of at most this length, so that it costs little in attention. It is the
block size of attention kernels: shorter sequences would save nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankShare:
    """The part of a global batch that a rank computes, and its form."""

    dp_rank: int
    dp_size: int
    micro_batch_size: int
    """Rows of a micro-batch; packed rows are concatenated."""
    pad_to_multiple: int = 1
    """Row lengths are multiples of this (data.pad_to_multiple) ..."""
    sequence_multiple: int = 1
    """... and of this, which the topology requires (Topology.sequence_multiple)."""
    micro_batch_multiple: int = 1
    """The number of micro-batches is a multiple of this (Topology.micro_batch_multiple)."""
    row_length: int | None = None
    """Maximum tokens of a packed row. None: each example has a row of its own."""
    cp_rank: int = 0
    cp_size: int = 1
    """Context parallel ranks, which share each row."""
    noise_seed: int | None = None
    """Seed of the noise on embeddings (train.neftune_alpha). None: nothing says which example is where."""


_BY_TOKEN = (
    "tokens",
    "labels",
    "loss_weights",
    "position_ids",
    "documents",
    "example_seeds",
    "example_lengths",
)
"""The fields of a micro-batch that have a number for each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Input of one forward pass. The first five tensors are [rows, row length], one row if packed."""

    tokens: torch.Tensor
    labels: torch.Tensor
    """The token that follows each token in its example, 0 where none does."""
    loss_weights: torch.Tensor
    """Weight of each label in the loss, 0 on padding and in empty slots."""
    position_ids: torch.Tensor
    """Position of each token in its own sequence."""
    documents: torch.Tensor | None = None
    """Which example of the micro-batch each token belongs to, counted from 1; 0 on padding."""
    document_lengths: torch.Tensor | None = None
    """Tokens of each example of the micro-batch; the first entry stands for padding and is 0."""
    supervised: torch.Tensor | None = None
    """Where loss_weights is not 0, as indices into hidden states [row length * rows]: position * rows + row. Computed
    on the host, because finding them on the device would make each step wait for it."""
    cu_seqlens: torch.Tensor | None = None
    """int32 offsets where the sequences of a packed row begin, and its end. None without packing."""
    seq_lengths: tuple[int, ...] | None = None
    """Lengths of the same sequences, padding last; on the host for the same reason."""
    context_share: ContextShare | None = None
    """The part of the rows that this context parallel rank computes. None: all."""
    example_seeds: torch.Tensor | None = None
    """int64 [rows, row length]: a number of the example, the step and the seed, for noise. None: there is none."""
    example_lengths: torch.Tensor | None = None
    """int64 of the same shape: tokens of the example, its last target included; 0 on padding."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> MicroBatch:
        """Return this micro-batch on `device`."""
        return replace(
            self, **{name: tensor.to(device, non_blocking=non_blocking) for name, tensor in self._tensors().items()}
        )

    def pin_memory(self) -> MicroBatch:
        """Return this micro-batch in page-locked memory. Lightning and DataLoader call this method by its name."""
        return replace(self, **{name: tensor.pin_memory() for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, torch.Tensor | ContextShare)}

    def own_part(self) -> MicroBatch:
        """Return the part that this context parallel rank computes. cu_seqlens and seq_lengths stay those of rows."""
        share = self.context_share
        if share is None:
            return self
        whole = {name: getattr(self, name) for name in _BY_TOKEN}
        parts: dict[str, Any] = {name: share.part_of(rows) for name, rows in whole.items() if rows is not None}
        return replace(self, **parts, supervised=share.supervised)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank needs for one optimizer step. All numbers are those of the global batch, over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    step: int
    global_weight: float
    """Sum of the target weights, by which the summed loss is divided."""
    examples: int
    """Examples; empty slots are not counted."""
    tokens: int
    """Input tokens; padding is not counted."""
    squared_lengths: int
    """Sum of the squared input lengths of the examples, to which the cost of attention is proportional."""
    supervised_tokens: int
    """Targets with a weight other than 0."""

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> StepBatch:
        """Return this batch on `device`."""
        moved = tuple(batch.to(device, non_blocking=non_blocking) for batch in self.micro_batches)
        return replace(self, micro_batches=moved)

    def pin_memory(self) -> StepBatch:
        """Return this batch in page-locked memory."""
        return replace(self, micro_batches=tuple(batch.pin_memory() for batch in self.micro_batches))


def collate(cache: Examples, schedule: BatchSchedule, step: int, share: RankShare) -> StepBatch:
    """Return the batch of `step` for one rank."""
    slots = schedule.examples_at(step)
    examples = slots[slots != EMPTY_SLOT]
    lengths = cache.lengths
    rows = _padded_rows(slots, share) if share.row_length is None else _packed_rows(schedule, step, lengths, share)
    # Rows are only as long as the longest of this rank: other ranks may have others, which nothing depends on.
    longest = max((int((lengths[row] - 1).sum()) for batch in rows for row in batch), default=1)
    padded = rounded_up(max(longest, 1), math.lcm(share.pad_to_multiple, share.sequence_multiple))
    return StepBatch(
        micro_batches=tuple(_micro_batch(cache, batch, padded, share, step) for batch in rows),
        step=step,
        global_weight=float(cache.target_weights[examples].sum()),
        examples=len(examples),
        tokens=int((lengths[examples] - 1).sum()),
        squared_lengths=int(np.square(lengths[examples].astype(np.int64) - 1).sum()),
        supervised_tokens=int(cache.supervised[examples].sum()),
    )


ExampleIds = NDArray[np.int64]
"""The examples of one row, none in an empty row."""


def _padded_rows(slots: NDArray[np.int64], share: RankShare) -> list[list[ExampleIds]]:
    """Return this rank's micro-batches of rows that hold one example or none."""
    slots = complete(slots, share.dp_size * share.micro_batch_size * share.micro_batch_multiple)
    mine = [slot[slot != EMPTY_SLOT] for slot in rank_slice(slots, share.dp_rank, share.dp_size)[:, None]]
    size = share.micro_batch_size
    return [mine[first : first + size] for first in range(0, len(mine), size)]


def _packed_rows(
    schedule: BatchSchedule, step: int, lengths: NDArray[np.int64], share: RankShare
) -> list[list[ExampleIds]]:
    """Return this rank's micro-batches, each of one packed row, which may be empty."""
    assert share.row_length is not None
    multiple = share.micro_batch_multiple * share.micro_batch_size
    slots = schedule.examples_at(step)
    examples = slots[slots != EMPTY_SLOT]
    given = schedule.rows_at(step)
    if given is not None:
        given = Rows(np.arange(len(examples)), given.offsets)  # as indices into the step's examples
    rows = pack_step(lengths[examples] - 1, share.row_length, share.dp_size, multiple, given)
    packed = [examples[row] for row in rows]
    table = assign_rows([row_cost(lengths[row] - 1) for row in packed], share.dp_size, multiple)
    nothing = np.zeros(0, dtype=np.int64)
    mine = [nothing if row == EMPTY_ROW else packed[row] for row in table[share.dp_rank].tolist()]
    size = share.micro_batch_size
    return [[_joined(mine[first : first + size], lengths)] for first in range(0, len(mine), size)]


def _joined(rows: Sequence[ExampleIds], lengths: NDArray[np.int64]) -> ExampleIds:
    """Return packed rows as one, its longest example first."""
    # Attention kernels work through sequences in this order; the longest should not be the last to start.
    if len(rows) == 1:
        return rows[0]
    examples = np.concatenate(rows)
    return examples[np.argsort(-lengths[examples], kind="stable")]


def _micro_batch(cache: Examples, rows: Sequence[ExampleIds], padded: int, share: RankShare, step: int) -> MicroBatch:
    """Return a micro-batch of `rows`, each of `padded` tokens, of this step.

    An example of n tokens has n - 1 inputs and n - 1 targets: its last token is only a target, its first only an input.
    """
    shape = (len(rows), padded)
    tokens = np.zeros(shape, dtype=np.int64)
    labels = np.zeros(shape, dtype=np.int64)
    loss_weights = np.zeros(shape, dtype=np.float32)
    positions = np.zeros(shape, dtype=np.int64)  # 0 on padding, which may be longer than the positions of the model
    seeds = np.zeros(shape, dtype=np.int64)
    lengths = np.zeros(shape, dtype=np.int64)
    documents = np.zeros(shape, dtype=np.int64)
    document_lengths = [0]
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
            if share.noise_seed is not None:
                seeds[row, place] = example_seed(share.noise_seed, step, example)
                lengths[row, place] = len(ids)
            documents[row, place] = len(document_lengths)
            document_lengths.append(count)
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
        documents=torch.from_numpy(documents),
        document_lengths=torch.tensor(document_lengths),
        supervised=torch.from_numpy(np.flatnonzero(loss_weights.T)),
        cu_seqlens=torch.tensor(np.cumsum([0, *seq_lengths]), dtype=torch.int32) if packed else None,
        seq_lengths=tuple(seq_lengths) if packed else None,
        context_share=own,
        example_seeds=None if share.noise_seed is None else torch.from_numpy(seeds),
        example_lengths=None if share.noise_seed is None else torch.from_numpy(lengths),
    )


def example_seed(seed: int, step: int, example: int) -> int:
    """Return a number of 64 bits that belongs to this example in this step of a run with this seed."""
    digest = hashlib.blake2b(f"{seed} {step} {example}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def _padding(count: int) -> list[int]:
    """Return the lengths of sequences that `count` tokens of padding are cut into."""
    whole, rest = divmod(count, _PADDING_SEQUENCE)
    return [_PADDING_SEQUENCE] * whole + [rest] * (rest > 0)
