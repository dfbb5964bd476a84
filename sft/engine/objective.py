"""Express each training objective as loss weights: all of them are sum(weight * nll) / divisor over the global batch.

The token mean takes the weights as they are, and their sum as the divisor. The others rescale the weights by numbers
that are in the micro-batch itself, and change the divisor to one that every rank knows. Nothing else needs to know
which objective it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sft.data.batches.batch import MicroBatch, StepBatch

Objective = Literal["token_mean", "example_mean", "microbatch_mean"]


def weighted_for(objective: Objective, batch: StepBatch, data_parallel: int) -> StepBatch:
    """Return the batch with the weights and the divisor of `objective`.

    In the mean of micro-batch means, a micro-batch without targets counts as 0; other trainers compute 0 / 0.
    """
    if objective == "token_mean":
        return batch
    if objective == "example_mean":
        return _rescaled(batch, _example_sums, float(batch.examples))
    return _rescaled(batch, _micro_batch_sums, float(len(batch.micro_batches) * data_parallel))


def _rescaled(batch: StepBatch, sums: Callable[[MicroBatch], Tensor], divisor: float) -> StepBatch:
    """Return the batch with each weight divided by the sum that it belongs to, and with this divisor."""
    micro_batches = []
    for part in batch.micro_batches:
        total = sums(part)
        weights = torch.where(total > 0, part.loss_weights / total, 0.0)
        micro_batches.append(replace(part, loss_weights=weights))
    return replace(batch, micro_batches=tuple(micro_batches), global_weight=divisor)


def _micro_batch_sums(part: MicroBatch) -> Tensor:
    return part.loss_weights.sum()


def _example_sums(part: MicroBatch) -> Tensor:
    """Return, for each position, the summed weight of its example: of the row, or of its sequence in a packed row."""
    weights = part.loss_weights
    if part.seq_lengths is None:
        return weights.sum(dim=1, keepdim=True)
    lengths = torch.tensor(part.seq_lengths)
    owners = torch.repeat_interleave(torch.arange(len(lengths)), lengths).to(weights.device, non_blocking=True)
    sums = torch.zeros(len(lengths), dtype=weights.dtype, device=weights.device).index_add(0, owners, weights[0])
    return sums[owners][None]
