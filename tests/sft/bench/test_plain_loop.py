"""The rows that other trainers are given."""

from __future__ import annotations

import torch

from sft.bench.plain_loop import IGNORED, packed_batches, padded_batches
from sft.bench.workload import Workload

RAGGED = Workload(shape="1b", data="ragged", seq_length=512, rows=4)


def test_padded_rows_hold_the_same_examples_as_concatenated_ones() -> None:
    for concatenated, padded in zip(packed_batches(RAGGED, 3, 2), padded_batches(RAGGED, 3, 2), strict=True):
        assert padded[1:] == concatenated[1:], "lengths and targets"
        rows = padded[0]
        assert {tuple(tensor.shape) for tensor in rows.values()} == {(2, 512)}
        starts = rows["position_ids"] == 0
        examples = starts.flatten().cumsum(0).bincount()[1:].tolist()
        without_padding = [length for length in examples if length in padded[1]]
        assert sum(without_padding) >= sum(padded[1]), "an example is cut in two"
        assert len(examples) <= len(padded[1]) + 2, "at most one example of padding a row"


def test_a_padded_rows_label_is_the_next_token_of_the_same_example() -> None:
    seen = 0
    for rows, _, targets in padded_batches(RAGGED, 2):
        trained = rows["labels"] != IGNORED
        assert int(trained.sum()) == targets
        follows = torch.roll(rows["input_ids"], -1, dims=1)
        assert torch.equal(rows["labels"][trained], follows[trained])
        last = torch.roll(rows["position_ids"], -1, dims=1) == 0
        assert not (trained & last).any(), "the first token of another example was a target"
        seen += targets
    assert seen > 1000


def test_full_rows_have_no_padding() -> None:
    workload = Workload(shape="1b", data="full", seq_length=64, rows=2)
    ((rows, lengths, targets),) = padded_batches(workload, 1)
    assert (lengths, targets) == ([64, 64], 2 * 63)
    assert torch.equal(rows["position_ids"], torch.arange(64).expand(2, 64))
