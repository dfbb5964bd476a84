"""Samples become the ids and masks that trlx's NeMo trainer made of them; the golden vectors are the original's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec, RunSpec, TrainSpec
from sft.compat.trlx import PromptPipeline, ShuffledCyclicSequence
from sft.compat.trlx.run import _lines, _row
from sft.compat.trlx.samples import SampleEncoder, Tokens, collate
from sft.data.batches.batch import RankShare
from sft.data.batches.batch import collate as batch_of
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.schedule import training_schedule
from tests.sft.compat.material import BOS, EOS, character_tokenizer

SAMPLES = ("AB", "ABCDEFGH", "")


def encoder(
    seq_length: int = 6, add_bos: bool = False, add_eos: bool = True, side: str = "right", max_length: int = 6
) -> SampleEncoder:
    return SampleEncoder(
        tokenizer=character_tokenizer(side),
        seq_length=seq_length,
        max_length=max_length,
        add_bos=add_bos,
        add_eos=add_eos,
    )


def batch(encode: SampleEncoder, samples: tuple[str, ...] = SAMPLES) -> tuple[list[list[int]], list[list[float]]]:
    ids, masks = collate([encode(sample) for sample in samples], 6, pad_id=EOS)
    return ids.tolist(), masks.tolist()


def test_golden_with_bos_and_eos() -> None:
    ids, masks = batch(encoder(add_bos=True))
    assert ids == [[1, 65, 66, 2, 2, 2], [1, 65, 66, 67, 68, 69], [1, 2, 2, 2, 2, 2]]
    assert masks == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 0, 0, 0, 0]]


def test_golden_without_bos() -> None:
    ids, masks = batch(encoder())
    assert ids == [[65, 66, 2, 2, 2, 2], [65, 66, 67, 68, 69, 70], [2] * 6]
    assert masks == [[1, 1, 1, 0, 0, 0], [1] * 6, [1, 0, 0, 0, 0, 0]]


def test_golden_of_a_shorter_seq_length() -> None:
    """Cut to 4 characters first, so that BOS and EOS fit."""
    ids, masks = batch(encoder(seq_length=4, add_bos=True), ("ABCDEFGH",))
    assert (ids, masks) == ([[1, 65, 66, 67, 68, 2]], [[1] * 6])


def test_golden_of_truncation_on_the_left() -> None:
    ids, _ = batch(encoder(add_bos=True, side="left"), ("ABCDEFGH",))
    assert ids == [[1, 67, 68, 69, 70, 71]]


def test_golden_order_of_the_cyclic_sequence() -> None:
    golden = [7, 12, 17, 6, 15, 19, 10, 11, 2, 0, 4, 13, 1, 5, 14, 18, 16, 8, 9, 3]
    assert list(ShuffledCyclicSequence(20, range(20), 1000)) == golden
    few = ShuffledCyclicSequence(20, ["a", "b", "c"], 1000)
    assert (len(few), few[0], few[1], few[3]) == (20, "b", "a", "a")
    assert few.perm.tolist() == golden


def test_batches_of_a_run_are_the_originals(tmp_path: Path) -> None:
    """Order, data parallel shard block[r::dp], micro-batches and targets, through the real token cache."""
    encode = encoder(max_length=12, seq_length=10)
    tokens = [encode("ABCDEFGHIJ"[: 1 + number]) for number in range(7)]
    (tmp_path / "samples.jsonl").write_text(_lines(map(_row, tokens)))
    tokenizer = tmp_path / "tokenizer"
    character_tokenizer().save_pretrained(tokenizer)
    spec = RunSpec(
        run_root=str(tmp_path),
        data=DataSpec(train=[str(tmp_path / "samples.jsonl")], seq_length=12, cyclic_seed=1000, workers=1),
        train=TrainSpec(max_steps=5, global_batch_size=4),
    )
    cache = open_or_build(spec, tokenizer, build=True).train
    plan = training_schedule(spec, cache)
    order = ShuffledCyclicSequence(20, tokens, 1000)
    for step in range(5):
        block = [order[place] for place in range(4 * step, 4 * step + 4)]
        for rank in range(2):
            share = RankShare(dp_rank=rank, dp_size=2, micro_batch_size=2)
            (found,) = batch_of(cache, plan, step, share).micro_batches
            ids, masks = collate(block[rank::2], 12, pad_id=EOS)
            width = found.tokens.shape[1]
            trained = masks[:, 1 : width + 1]
            assert torch.equal(found.loss_weights, trained)
            assert masks[:, width + 1 :].sum() == 0
            assert torch.equal(found.labels * (trained > 0), ids[:, 1 : width + 1] * (trained > 0))
            assert torch.equal(found.tokens * (trained > 0), ids[:, :width] * (trained > 0))


def test_outputs_of_a_dialog_are_trained_and_its_prompts_are_not() -> None:
    assert encoder(max_length=9)(("AB", "CD")) == Tokens((65, 66, 67, 68, EOS), (0, 0, 1, 1, 1))
    assert encoder(max_length=9)(["A", "B", "C", "D"]).loss_mask == (0, 1, 0, 1, 1)
    with_bos = encoder(max_length=9, add_bos=True)(("A", "B"))
    assert (with_bos.input_ids, with_bos.loss_mask) == ((BOS, 65, 66, EOS), (0, 0, 1, 1))


def test_a_dialog_that_ends_with_eos_gets_no_second_one() -> None:
    assert encoder(max_length=9)(("A", "B</s>")).input_ids == (65, 66, EOS)
    assert encoder(max_length=9)("B</s>").input_ids == (66, EOS, EOS)  # of a text the original asks nothing


def test_a_dialog_is_cut_as_a_whole() -> None:
    left = encoder(seq_length=3, side="left", max_length=9)(("ABC", "DE"))
    assert (left.input_ids, left.loss_mask) == ((67, 68, 69, EOS), (0, 1, 1, 1))
    right = encoder(seq_length=3, max_length=3)(("ABC", "DE"))
    assert (right.input_ids, right.has_targets) == ((65, 66, 67), False)


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (("A", "B", "C"), r"samples\[3\]: 3 texts; prompts and outputs in turn are an even number"),
        ((), r"samples\[3\]: 0 texts"),
        (({"role": "user", "content": "A"},), r"samples\[3\]: a sample is a text, or prompts and outputs"),
    ],
)
def test_other_samples_are_refused_by_number(sample: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        encoder()(sample, "samples[3]")  # type: ignore[arg-type]


def test_prompts_are_cut_on_the_truncation_side_and_keep_what_stands_beside_them() -> None:
    pipeline = PromptPipeline([{"prompt": "ABCD", "label": 3}, "E"], 2, character_tokenizer("left"))
    assert list(pipeline) == [{"input_ids": [67, 68], "prompt": "ABCD", "label": 3}, {"input_ids": [69], "prompt": "E"}]
    with pytest.raises(DataError, match=r"eval_prompts\[0\]"):
        PromptPipeline([{"text": "A"}], 2, character_tokenizer())
