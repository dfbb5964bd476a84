"""Padded micro-batches: what is a target, what is padding, and the numbers of the global batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import sft.data.batches.packing
from sft.data.batches.batch import MicroBatch, RankShare, StepBatch, collate, example_seed
from sft.data.batches.sampler import BatchSchedule, ExampleSchedule, TokenSchedule, rank_slice
from sft.data.cache.store import TokenCache
from tests.sft.caches_for_tests import make_cache, ragged_pairs


def schedule_of(cache: TokenCache, size: int = 8, shuffle: bool = True) -> ExampleSchedule:
    return ExampleSchedule(num_examples=len(cache), global_batch_size=size, seed=3, shuffle=shuffle)


def batch_of(
    cache: TokenCache, schedule: BatchSchedule, step: int, rank: int = 0, dp: int = 1, **sizes: int | None
) -> StepBatch:
    values: dict[str, Any] = {"micro_batch_size": 2, "pad_to_multiple": 4, "sequence_multiple": 1} | sizes
    return collate(cache, schedule, step, RankShare(dp_rank=rank, dp_size=dp, **values))


def rows(batch: StepBatch) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    return [
        (micro.tokens[i], micro.labels[i], micro.loss_weights[i])
        for micro in batch.micro_batches
        for i in range(len(micro.tokens))
    ]


def test_trap_5_an_example_of_n_tokens_has_n_minus_1_targets_of_its_own(tmp_path: Path) -> None:
    """Seen to fail with labels rolled over the flat cache, where the last token predicts the next example's first."""
    pairs = [([5, 6, 7], [1.0, 1.0, 1.0]), ([8, 9, 4, 3], [0.0, 0.0, 0.5, 1.0])]
    cache = make_cache(tmp_path / "cache", pairs)
    (batch,) = batch_of(cache, schedule_of(cache, 2, shuffle=False), 0).micro_batches
    assert batch.tokens.tolist() == [[5, 6, 0, 0], [8, 9, 4, 0]]
    assert batch.labels.tolist() == [[6, 7, 0, 0], [9, 4, 3, 0]]
    assert batch.loss_weights.tolist() == [[1, 1, 0, 0], [0, 0.5, 1, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0], [0, 1, 2, 0]]
    assert batch.cu_seqlens is None


def test_trap_7_lengths_come_from_the_index_and_never_from_ids(tmp_path: Path) -> None:
    """Padding and end ids anywhere change nothing. Seen to fail with a mask made of `tokens != 0`."""
    pairs = ragged_pairs(40, vocab=3)
    cache = make_cache(tmp_path / "cache", pairs)
    schedule = schedule_of(cache)
    for step in range(schedule.steps_per_epoch):
        for example, (tokens, labels, weights) in zip(
            schedule.examples_at(step), rows(batch_of(cache, schedule, step)), strict=True
        ):
            ids, expected = pairs[int(example)]
            assert tokens[: len(ids) - 1].tolist() == ids[:-1]
            assert labels[: len(ids) - 1].tolist() == ids[1:]
            assert weights[: len(ids) - 1].tolist() == expected[1:]
            assert not weights[len(ids) - 1 :].any()


def test_trap_8_an_end_token_that_is_the_padding_token_keeps_its_weight(tmp_path: Path) -> None:
    """Seen to fail with weights cleared where the label is the padding id."""
    cache = make_cache(tmp_path / "cache", [([4, 5, 0], [0.0, 1.0, 1.0]), ([4, 5, 6, 7, 8, 0], [0.0] * 5 + [1.0])])
    (batch,) = batch_of(cache, schedule_of(cache, 2, shuffle=False), 0).micro_batches
    assert batch.loss_weights[0].tolist()[:3] == [1, 1, 0]
    assert batch.loss_weights[1].tolist()[:5] == [0, 0, 0, 0, 1]


def test_trap_16_every_data_parallel_size_trains_the_same_rows(tmp_path: Path) -> None:
    """Seen to fail with a schedule that is seeded by the rank."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(21))
    schedule = schedule_of(cache)
    for step in range(2 * schedule.steps_per_epoch):
        alone = batch_of(cache, schedule, step)
        for dp in (2, 4):
            shares = [batch_of(cache, schedule, step, rank, dp) for rank in range(dp)]
            assert {share.global_weight for share in shares} == {alone.global_weight}
            assert {(share.tokens, share.supervised_tokens, share.examples) for share in shares} == {
                (alone.tokens, alone.supervised_tokens, alone.examples)
            }
            assert sorted(row for share in shares for row in targets(share)) == sorted(targets(alone))


def targets(batch: StepBatch) -> list[tuple[list[int], list[float]]]:
    """Labels and weights of each row without the padding, whose amount differs between ranks."""
    found = []
    for _, labels, weights in rows(batch):
        count = int(weights.nonzero().max()) + 1 if weights.any() else 0
        found.append((labels[:count].tolist(), weights[:count].tolist()))
    return found


def test_trap_17_empty_slots_change_neither_loss_nor_gradient(tmp_path: Path) -> None:
    """5 examples in a batch of 8 train as 5 do. Seen to fail with empty slots filled by example 0."""
    pairs = ragged_pairs(5)
    cache = make_cache(tmp_path / "cache", pairs)
    batch = batch_of(cache, schedule_of(cache, 8), 0)
    table = torch.nn.Parameter(torch.randn(50, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    summed = torch.stack([_weighted(table, *row) for row in rows(batch)]).sum() / batch.global_weight
    (gradient,) = torch.autograd.grad(summed, table)
    alone = [
        (torch.tensor(ids[:-1]), torch.tensor(ids[1:]), torch.tensor(weights[1:], dtype=torch.float32))
        for ids, weights in pairs
    ]
    expected = torch.stack([_weighted(table, *row) for row in alone]).sum() / sum(
        float(weights.sum()) for _, _, weights in alone
    )
    (expected_gradient,) = torch.autograd.grad(expected, table)
    assert batch.examples == 5
    torch.testing.assert_close(summed, expected)
    torch.testing.assert_close(gradient, expected_gradient)


def _weighted(table: torch.Tensor, tokens: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    losses = torch.nn.functional.cross_entropy(table[tokens], labels, reduction="none")
    return (losses * weights).sum()


def test_trap_19_evaluation_counts_every_example_once(tmp_path: Path) -> None:
    """200 examples at batch 256 evaluate 200. Seen to fail with steps_per_epoch rounded down (0 steps)."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(200))
    schedule = schedule_of(cache, 256, shuffle=False)
    batches = [batch_of(cache, schedule, 0, rank, 4) for rank in range(4)]
    assert schedule.steps_per_epoch == 1
    assert batches[0].examples == 200
    assert sum(len(ids) > 0 for batch in batches for ids, _ in targets(batch)) == 200
    assert batches[0].global_weight == sum(float(w.sum()) for batch in batches for _, _, w in rows(batch))


def test_numbers_of_the_global_batch(tmp_path: Path) -> None:
    pairs = [([5, 6, 7], [9.0, 1.0, 1.0]), ([8, 9, 4, 3], [0.0, 0.0, 0.5, 1.0])]
    cache = make_cache(tmp_path / "cache", pairs)
    batch = batch_of(cache, schedule_of(cache, 4), 0, micro_batch_size=1)
    assert (batch.global_weight, batch.examples, batch.tokens, batch.supervised_tokens) == (3.5, 2, 5, 4)
    assert batch.squared_lengths == 2**2 + 3**2
    assert len(batch.micro_batches) == 4


def test_all_micro_batches_of_a_step_have_one_shape(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(30))
    schedule = schedule_of(cache)
    for step in range(schedule.steps_per_epoch):
        batch = batch_of(cache, schedule, step, rank=1, dp=2, pad_to_multiple=4, sequence_multiple=6)
        (shape,) = {micro.tokens.shape for micro in batch.micro_batches}
        mine = [i for i in rank_slice(schedule.examples_at(step), 1, 2) if i >= 0]
        longest = max(int(cache.lengths[i]) - 1 for i in mine)
        assert shape[1] % 12 == 0
        assert longest <= shape[1] < longest + 12


def test_a_rank_without_examples_gets_rows_without_weight(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(1))
    batch = batch_of(cache, schedule_of(cache, 4), 0, rank=1, dp=2)
    assert [micro.tokens.shape for micro in batch.micro_batches] == [(2, 4)]
    assert not any(micro.loss_weights.any() for micro in batch.micro_batches)
    assert batch.global_weight > 0


def test_batches_move_to_a_device_with_all_their_tensors() -> None:
    tensors = {name: torch.ones(1, 2) for name in ("tokens", "labels", "loss_weights", "position_ids")}
    micro = MicroBatch(**tensors, cu_seqlens=torch.tensor([0, 2]))
    batch = StepBatch(
        micro_batches=(micro,), step=1, global_weight=2.0, examples=1, tokens=2, squared_lengths=4, supervised_tokens=2
    ).to("meta")
    (moved,) = batch.micro_batches
    assert moved.tokens.device.type == "meta"
    assert moved.cu_seqlens is not None
    assert moved.cu_seqlens.device.type == "meta"
    assert batch.global_weight == 2.0


def test_a_share_that_does_not_divide_is_completed_with_empty_slots(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(8))
    batch = batch_of(cache, schedule_of(cache), 0, micro_batch_size=3, micro_batch_multiple=2)
    assert len(batch.micro_batches) == 4
    assert sum(bool(weights.any()) for _, _, weights in rows(batch)) == 8


def test_dtypes(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(8))
    (micro, *_) = batch_of(cache, schedule_of(cache), 0).micro_batches
    assert [tensor.dtype for tensor in (micro.tokens, micro.labels, micro.position_ids)] == [torch.int64] * 3
    assert micro.loss_weights.dtype == torch.float32
    assert cache.target_weights.dtype == np.float64


PACKED: dict[str, int | None] = {"micro_batch_size": 1, "row_length": 24}


def packed_sequences(batch: StepBatch) -> list[tuple[list[int], list[int], list[float], list[int]]]:
    """Tokens, labels, weights and positions of each sequence of a packed batch, padding included."""
    found = []
    for micro in batch.micro_batches:
        assert micro.seq_lengths is not None and micro.cu_seqlens is not None
        assert micro.cu_seqlens.tolist() == [0, *np.cumsum(micro.seq_lengths).tolist()]
        fields = (micro.tokens[0], micro.labels[0], micro.loss_weights[0], micro.position_ids[0])
        for start, end in zip(micro.cu_seqlens[:-1].tolist(), micro.cu_seqlens[1:].tolist(), strict=True):
            found.append(tuple(tensor[start:end].tolist() for tensor in fields))
    return found  # type: ignore[return-value]


def schedules_of(cache: TokenCache) -> list[BatchSchedule]:
    lengths = cache.lengths - 1
    return [
        schedule_of(cache),
        TokenSchedule(lengths=lengths, row_length=24, rows_per_step=3, seed=3, shuffle=True),
    ]


def test_trap_5_and_12_packed_examples_are_what_they_are_alone(tmp_path: Path) -> None:
    """Labels end with the example's own last token, positions begin at 0, as many targets as tokens less one. Seen to
    fail with labels rolled over the row (5) and with positions that run on (12)."""
    pairs = ragged_pairs(40, vocab=1000)
    cache = make_cache(tmp_path / "cache", pairs)
    for schedule in schedules_of(cache):
        found = []
        for step in range(schedule.steps_per_epoch):
            batch = batch_of(cache, schedule, step, **PACKED)
            found += [sequence for sequence in packed_sequences(batch) if any(sequence[0])]
        expected = [(ids[:-1], ids[1:], weights[1:], list(range(len(ids) - 1))) for ids, weights in pairs]
        assert sorted(found) == sorted(expected)


def test_trap_6_padding_of_a_packed_row_is_a_sequence_of_its_own(tmp_path: Path) -> None:
    """Offsets cover the whole row. Seen to fail with the padding added to the last example's length."""
    cache = make_cache(tmp_path / "cache", [([5, 6, 7, 8], [1.0] * 4), ([9, 9, 9], [1.0] * 3)])
    schedule = schedule_of(cache, 2, shuffle=False)
    (micro,) = batch_of(cache, schedule, 0, **PACKED, pad_to_multiple=300).micro_batches
    assert micro.seq_lengths == (3, 2, 128, 128, 39)
    assert micro.position_ids[0, 3:8].tolist() == [0, 1, 0, 0, 0]
    assert not micro.loss_weights[0, 5:].any()
    (full,) = batch_of(cache, schedule, 0, **PACKED, pad_to_multiple=5).micro_batches
    assert full.seq_lengths == (3, 2)


@pytest.mark.parametrize("unit", [0, 1], ids=["examples", "tokens"])
def test_trap_16_every_data_parallel_size_trains_the_same_packed_examples(unit: int, tmp_path: Path) -> None:
    """Seen to fail with ranks that take every dp-th row of the whole, unassigned list, and each the rest as well."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(61, vocab=1000))
    schedule = schedules_of(cache)[unit]
    for step in range(schedule.steps_per_epoch):
        alone = batch_of(cache, schedule, step, **PACKED)
        for dp, multiple in ((2, 1), (3, 1), (4, 2)):
            sizes = {**PACKED, "micro_batch_multiple": multiple}
            shares = [batch_of(cache, schedule, step, rank, dp, **sizes) for rank in range(dp)]
            assert len({len(share.micro_batches) for share in shares}) == 1
            assert len(shares[0].micro_batches) % multiple == 0
            assert {share.global_weight for share in shares} == {alone.global_weight}
            found = [sequence for share in shares for sequence in packed_sequences(share) if any(sequence[0])]
            assert sorted(found) == sorted(sequence for sequence in packed_sequences(alone) if any(sequence[0]))


@pytest.mark.parametrize("level", [True, False], ids=["empty_rows", "no_rows"])
@pytest.mark.parametrize("unit", [0, 1], ids=["examples", "tokens"])
def test_trap_17_places_without_a_row_have_no_weight(
    unit: int, level: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """5 examples for 8 ranks. Seen to fail with empty places filled by the first row."""
    if not level:
        monkeypatch.setattr(sft.data.batches.packing, "levelled", lambda *_: None)
    cache = make_cache(tmp_path / "cache", ragged_pairs(5))
    shares = [batch_of(cache, schedules_of(cache)[unit], 0, rank, 8, **PACKED) for rank in range(8)]
    micro_batches = [micro for share in shares for micro in share.micro_batches]
    assert len(micro_batches) == 8
    assert sum(float(micro.loss_weights.sum()) for micro in micro_batches) == shares[0].global_weight
    assert shares[0].examples == 5
    assert not all(micro.loss_weights.any() for micro in micro_batches)


def test_trap_20_a_step_holds_the_same_examples_packed_or_padded(tmp_path: Path) -> None:
    """In both units. Seen to fail with a batch of 8 packed rows."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(61))
    for schedule in schedules_of(cache):
        for step in range(schedule.steps_per_epoch):
            packed, padded = batch_of(cache, schedule, step, **PACKED), batch_of(cache, schedule, step)
            assert numbers(packed) == numbers(padded)
            assert sum(float(micro.loss_weights.sum()) for micro in packed.micro_batches) == packed.global_weight
            assert sum(float(micro.loss_weights.sum()) for micro in padded.micro_batches) == packed.global_weight


def numbers(batch: StepBatch) -> tuple[float, int, int, int]:
    return batch.global_weight, batch.examples, batch.tokens, batch.supervised_tokens


def test_packed_rows_of_a_step_have_one_shape(tmp_path: Path) -> None:
    cache = make_cache(tmp_path / "cache", ragged_pairs(61))
    for schedule in schedules_of(cache):
        for step in range(schedule.steps_per_epoch):
            batch = batch_of(cache, schedule, step, rank=1, dp=2, **PACKED, pad_to_multiple=2, sequence_multiple=4)
            (shape,) = {micro.tokens.shape for micro in batch.micro_batches}
            assert shape[0] == 1
            assert shape[1] % 4 == 0 and shape[1] <= 24


def test_packed_rows_of_a_micro_batch_are_joined(tmp_path: Path) -> None:
    """The same examples as alone, their longest first, and as many micro-batches as rows ask for."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(16))
    alone = batch_of(cache, schedule_of(cache), 0, row_length=24, micro_batch_size=1)
    joined = batch_of(cache, schedule_of(cache), 0, row_length=24, micro_batch_size=2)
    assert len(joined.micro_batches) == -(-len(alone.micro_batches) // 2)
    assert real_tokens(joined) == real_tokens(alone)
    for micro in joined.micro_batches:
        assert micro.tokens.shape[0] == 1
        lengths = [length for length in micro.seq_lengths or () if length]
        assert lengths == sorted(lengths, reverse=True) or sum(lengths) > joined.tokens
    assert joined.global_weight == alone.global_weight


def real_tokens(batch: StepBatch) -> list[tuple[int, ...]]:
    """Token ids of every sequence that has targets."""
    found = []
    for micro in batch.micro_batches:
        lengths = list(micro.seq_lengths or ())
        parts = zip(micro.tokens[0].split(lengths), micro.loss_weights[0].split(lengths), strict=True)
        found += [tuple(tokens.tolist()) for tokens, weights in parts if weights.any()]
    return sorted(found)


@pytest.mark.parametrize("row_length", [None, 24])
def test_supervised_places_are_in_the_order_of_hidden_states(tmp_path: Path, row_length: int | None) -> None:
    """Position first, then row: [s, b] flattened."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(8))
    for micro in batch_of(cache, schedule_of(cache), 0, row_length=row_length, micro_batch_size=2).micro_batches:
        assert micro.supervised is not None
        weights = micro.loss_weights.t().reshape(-1)
        assert weights.any()
        assert torch.equal(micro.supervised, weights.nonzero().flatten())


@pytest.mark.parametrize("row_length", [None, 64])
def test_noise_knows_the_example_of_each_token_under_every_layout(tmp_path: Path, row_length: int | None) -> None:
    """Of a run with noise alone. The seed changes with the step, and lengths are those of whole examples."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(16, vocab=50))
    schedule = schedule_of(cache)
    plain = batch_of(cache, schedule, 0, row_length=row_length).micro_batches[0]
    assert plain.example_seeds is plain.example_lengths is None

    def found(step: int, dp: int, **sizes: int | None) -> set[tuple[int, int]]:
        batches = [batch_of(cache, schedule, step, rank, dp, noise_seed=5, **sizes) for rank in range(dp)]
        parts = [micro for batch in batches for micro in batch.micro_batches]
        pairs: set[tuple[int, int]] = set()
        for part in parts:
            assert part.example_seeds is not None and part.example_lengths is not None
            pairs |= set(
                zip(part.example_seeds.flatten().tolist(), part.example_lengths.flatten().tolist(), strict=True)
            )
        return pairs - {(0, 0)}  # padding

    def wanted(step: int) -> set[tuple[int, int]]:
        examples = [int(example) for example in schedule.examples_at(step)]
        return {(example_seed(5, step, example), len(cache.tokens(example)[0])) for example in examples}

    assert found(0, 1, row_length=row_length) == found(0, 2, row_length=row_length) == wanted(0)
    assert found(1, 1, row_length=row_length) == wanted(1)
    assert not {seed for seed, _ in wanted(0)} & {
        example_seed(5, 1, int(example)) for example in schedule.examples_at(0)
    }


@pytest.mark.parametrize("form", [{"micro_batch_size": 3}, PACKED, {**PACKED, "micro_batch_size": 2}])
def test_tokens_know_their_document(form: dict[str, int | None], tmp_path: Path) -> None:
    """Counted from 1 within a micro-batch; padding has none, wherever it is."""
    cache = make_cache(tmp_path / "cache", ragged_pairs(17, vocab=1000))
    seen = []
    for micro in batch_of(cache, schedule_of(cache, 17), 0, **form).micro_batches:
        assert micro.documents is not None and micro.document_lengths is not None
        counts = torch.bincount(micro.documents.flatten(), minlength=len(micro.document_lengths))
        assert micro.document_lengths[0] == 0
        assert torch.equal(counts[1:], micro.document_lengths[1:])
        seen += [micro.tokens[micro.documents == number + 1].tolist() for number in range(len(counts) - 1)]
        assert not micro.loss_weights[micro.documents == 0].any()
    assert sorted(seen) == sorted(ids[:-1] for ids, _ in ragged_pairs(17, vocab=1000))
