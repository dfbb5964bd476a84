"""Objectives as weights: each gives the mean that its name says, padded or packed."""

from __future__ import annotations

import pytest
import torch

from sft.data.batches.batch import MicroBatch, StepBatch
from sft.engine.module import _weighted_sum
from sft.engine.objective import Objective, weighted_for

NLL = {3: 1.906764, 5: 1.623004}
"""Mean losses of two rows with 3 and 5 targets, solved for from the two documented losses.

Which model and rows gave those is not documented. So what follows them is arithmetic; against losses of a real model
the objective is held in tests/parity/test_trlx.py.
"""


def padded(counts: list[int], width: int = 6) -> MicroBatch:
    weights = torch.tensor([[1.0] * count + [0.0] * (width - count) for count in counts])
    ids = torch.zeros(weights.shape, dtype=torch.int64)
    return MicroBatch(tokens=ids, labels=ids, loss_weights=weights, position_ids=ids)


def step(*micro_batches: MicroBatch, examples: int) -> StepBatch:
    weight = float(sum(part.loss_weights.sum() for part in micro_batches))
    return StepBatch(
        micro_batches=micro_batches,
        step=0,
        global_weight=weight,
        examples=examples,
        tokens=9,
        squared_lengths=81,
        supervised_tokens=8,
    )


def loss(objective: Objective, batch: StepBatch, rows: list[list[float]], data_parallel: int = 1) -> float:
    """The loss that training minimises; `rows` holds each micro-batch's mean loss of each row."""
    weighted = weighted_for(objective, batch, data_parallel)
    total = 0.0
    for part, means in zip(weighted.micro_batches, rows, strict=True):
        losses = torch.tensor(means)[:, None].expand(part.loss_weights.shape)
        total += float(_weighted_sum(part.loss_weights, losses)[0])
    return total / weighted.global_weight


def test_arithmetic_of_the_documented_mean_of_micro_batch_means() -> None:
    """The numbers of a trainer that minimises it: 1.729414 at micro-batch 2, 1.764884 at micro-batch 1."""
    one = step(padded([3, 5]), examples=2)
    two = step(padded([3]), padded([5]), examples=2)
    assert loss("microbatch_mean", one, [[NLL[3], NLL[5]]]) == pytest.approx(1.729414, abs=1e-6)
    assert loss("microbatch_mean", two, [[NLL[3]], [NLL[5]]]) == pytest.approx(1.764884, abs=1e-6)


@pytest.mark.parametrize(("objective", "expected"), [("token_mean", 1.729414), ("example_mean", 1.764884)])
def test_other_means_do_not(objective: Objective, expected: float) -> None:
    one = step(padded([3, 5]), examples=2)
    two = step(padded([3]), padded([5]), examples=2)
    assert loss(objective, one, [[NLL[3], NLL[5]]]) == pytest.approx(expected, abs=1e-6)
    assert loss(objective, two, [[NLL[3]], [NLL[5]]]) == pytest.approx(expected, abs=1e-6)


def test_micro_batches_of_all_ranks_are_counted() -> None:
    mine = step(padded([3]), examples=2)
    assert loss("microbatch_mean", mine, [[2.0]], data_parallel=2) == pytest.approx(1.0)


@pytest.mark.parametrize("objective", ["example_mean", "microbatch_mean"])
def test_nothing_to_train_on_counts_nothing(objective: Objective) -> None:
    batch = step(padded([3]), padded([0]), examples=1)
    weighted = weighted_for(objective, batch, 1)
    assert torch.equal(weighted.micro_batches[1].loss_weights, torch.zeros(1, 6))


def test_examples_of_a_packed_row_count_alike() -> None:
    weights = torch.tensor([[1.0, 1.0, 1.0, 0.5, 0.5, 0.0, 0.0]])
    ids = torch.zeros(weights.shape, dtype=torch.int64)
    row = MicroBatch(
        tokens=ids,
        labels=ids,
        loss_weights=weights,
        position_ids=ids,
        cu_seqlens=torch.tensor([0, 3, 5, 7], dtype=torch.int32),
        seq_lengths=(3, 2, 2),
    )
    weighted = weighted_for("example_mean", step(row, examples=2), 1)
    assert weighted.global_weight == 2
    assert weighted.micro_batches[0].loss_weights[0].tolist() == pytest.approx([1 / 3] * 3 + [0.5] * 2 + [0.0] * 2)
