"""Training of other people's models in a plain loop: the packed rows, and the steps with AdamW."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.bench.result import StepClock
from sft.bench.workload import Workload
from sft.data.batches.packing import best_fit_decreasing

IGNORED = -100
"""The label of a token that is not trained."""
PackedBatch = tuple[dict[str, Tensor], list[int], int]
"""Inputs of a model, lengths of their examples, and how many of their tokens are targets."""
Example = tuple[Tensor, Tensor]
"""Token ids, and the label of each one as a target."""


def train_in_a_loop(
    clock: StepClock,
    batches: list[PackedBatch],
    micro_batches: int,
    model: torch.nn.Module,
    share_of: Callable[[dict[str, Tensor], list[int], int], Tensor],
    *,
    keep_gradients: bool = False,
) -> float:
    """Train with AdamW in a plain loop, each step timed, and return the last step's loss.

    `share_of` makes a micro-batch's share of it, from its inputs, the lengths of its examples and the targets of the
    whole step. What it returns without a graph has had its backward pass. With `keep_gradients` gradients are set to
    zero and not freed between steps, as CUDA graphs that write to them need.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = trained[0].device
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=device.type == "cuda")
    loss, waiting = torch.zeros(()), iter(batches)
    for parts in zip(*[waiting] * micro_batches, strict=True):
        clock.before_step()
        loss = torch.zeros((), device=device)
        targets = sum(supervised for _, _, supervised in parts)
        for batch, lengths, _ in parts:
            share = share_of(batch, lengths, targets)
            if share.requires_grad:
                share.backward()
            loss += share.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep_gradients)
        slots = sum(batch["input_ids"].numel() for batch, _, _ in parts)
        clock.after_step([length for _, lengths, _ in parts for length in lengths], slots, targets)
    return float(loss)


def packed_batches(workload: Workload, steps: int, micro_batches: int = 1) -> list[PackedBatch]:
    """Return the micro-batches of so many steps, of each its packed rows concatenated."""
    batches = []
    for rows in _micro_batches(workload, steps, micro_batches):
        examples = [example for row in rows for example in row]
        lengths = [len(ids) for ids, _ in examples]
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        batch = {
            "input_ids": torch.cat([ids for ids, _ in examples])[None],
            "labels": torch.cat([labels for _, labels in examples])[None],
            "position_ids": _positions(lengths)[None],
            "cu_seq_lens_q": offsets,
            "cu_seq_lens_k": offsets,
        }
        batches.append((batch, lengths, int((batch["labels"] != IGNORED).sum())))
    return batches


def padded_batches(workload: Workload, steps: int, micro_batches: int = 1) -> list[PackedBatch]:
    """Return the micro-batches of so many steps, of each its packed rows one below the other: [rows, seq_length].

    A label is the target at its own position. The padding at the end of a row is one more example, without a target.
    """
    batches = []
    for rows in _micro_batches(workload, steps, micro_batches):
        padded = [_padded(row, workload.seq_length) for row in rows]
        batch = {name: torch.stack([row[name] for row in padded]) for name in padded[0]}
        lengths = [len(ids) for row in rows for ids, _ in row]
        batches.append((batch, lengths, int((batch["labels"] != IGNORED).sum())))
    return batches


def _micro_batches(workload: Workload, steps: int, micro_batches: int) -> list[list[list[Example]]]:
    """Return the rows of each micro-batch, and of each row its examples."""
    examples = [_example(ids[: workload.seq_length], trained) for ids, trained in workload.examples(steps)]
    packed = best_fit_decreasing(np.array([len(ids) for ids, _ in examples], dtype=np.int64), workload.seq_length)
    order = torch.randperm(len(packed), generator=torch.Generator().manual_seed(workload.seed)).tolist()
    rows = [[examples[item] for item in packed[row].tolist()] for row in order[: steps * workload.rows]]
    size = workload.rows // micro_batches
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def _example(ids: NDArray[np.int32], trained: NDArray[np.bool_]) -> Example:
    tokens = torch.from_numpy(ids).long()
    labels = torch.where(torch.from_numpy(trained[: len(ids)]), tokens, IGNORED)
    labels[0] = IGNORED  # labels are shifted: this would be the target of the last token of another example
    return tokens, labels


def _padded(row: list[Example], length: int) -> dict[str, Tensor]:
    lengths = [len(ids) for ids, _ in row]
    padding = length - sum(lengths)
    nothing = torch.full((padding + 1,), IGNORED)
    return {
        "input_ids": torch.cat([*(ids for ids, _ in row), torch.zeros(padding, dtype=torch.long)]),
        "labels": torch.cat([*(labels for _, labels in row), nothing])[1:],
        "position_ids": _positions([*lengths, padding]),
    }


def _positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])
