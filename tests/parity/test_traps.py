"""Traps of supervised fine-tuning on many ranks, each test named after its number in the project's list.

Traps of data and packing are tested with those; resume (16, 21), evaluation (19) and the grid of layouts (1) too.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sft.engine.module
from sft.megatron.core import parallel_state
from sft.megatron.model import SFTGPTModel
from sft.training.trainer import train
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.ranks import run_ranks
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_material, write_jsonl

pytestmark = pytest.mark.parity

LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp_plain": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {"distributed": False}),
    "pp2": (2, {"pipeline_parallel": 2}, {}),
    "pp2_plain": (2, {"pipeline_parallel": 2}, {"distributed": False}),
    "dp2": (2, {}, {}),
    "dp2_plain": (2, {}, {"distributed": False}),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, {}),
}
Material = tuple[Path, Path]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    """A model with tied embeddings, and 33 rows: with batches of 8, the fifth step holds one example."""
    return make_material(tmp_path_factory.mktemp("material"), 33, tied=True)


@pytest.mark.parametrize("name", thinned(LAYOUTS, "tp2_sp_plain", "dp2", "tp2_pp2"))
def test_trap_2_and_18_gradient_norm_is_that_of_one_process(
    name: str, tmp_path: Path, material: Material, reference_norms: tuple[list[float], list[float]]
) -> None:
    """Clipping bites in every step. The norm is of the mean over tokens, and counts the tied embedding once.

    Seen to fail: without the division before clipping norms are 350 times too large; with every parameter counted on
    every rank they are 10 % too large under pp2.
    """
    ranks, topology, settings = LAYOUTS[name]
    settings = {"clip_grad": 0.1, "lr": 1e-3, **settings}
    paths = make_run(tmp_path, *material, ranks=ranks, topology=topology, max_steps=5, **settings)
    run_training(paths, ranks)
    losses, norms = curve(paths)
    assert norms == pytest.approx(reference_norms[1], rel=2e-5)
    assert losses == pytest.approx(reference_norms[0], rel=1e-5)


@pytest.fixture(scope="module")
def reference_norms(tmp_path_factory: pytest.TempPathFactory, material: Material) -> tuple[list[float], list[float]]:
    root = tmp_path_factory.mktemp("reference")
    found = reference_curve(root, *material, steps=5, clip_grad=0.1, lr=1e-3)
    assert min(found.grad_norms) > 0.1
    return found.losses, found.grad_norms


def train_with_nan_in_padding(config: Path) -> Any:
    """Runs on a rank: the loss of every position without a target is NaN, forward and backward."""
    weighted_sum = sft.engine.module._weighted_sum

    def planted(weights: torch.Tensor, losses: torch.Tensor) -> Any:
        return weighted_sum(weights, losses + torch.where(weights == 0, float("nan"), 0.0))

    sft.engine.module._weighted_sum = planted
    return train(config)


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=["padded", "packed"])
def test_trap_3_nan_at_padding_reaches_nothing(settings: dict[str, Any], tmp_path: Path, material: Material) -> None:
    """Seen to fail: with losses multiplied by the weights, every loss is NaN."""
    clean = make_run(tmp_path, *material, ranks=1, name="clean", max_steps=2, **settings)
    run_training(clean, 1)
    planted = make_run(tmp_path, *material, ranks=1, name="planted", max_steps=2, **settings)
    run_training(planted, 1, function=train_with_nan_in_padding)
    assert curve(planted) == curve(clean)


def test_trap_3_ranks_without_a_target_stay_finite(tmp_path: Path, material: Material) -> None:
    """In the fifth step one example is left for four ranks.

    Seen to fail: with each micro-batch divided by its own number of targets, the fifth loss is NaN.
    """
    one = make_run(tmp_path, *material, ranks=1, name="one", max_steps=5)
    run_training(one, 1)
    four = make_run(tmp_path, *material, ranks=4, name="four", max_steps=5, micro_batch_size=2)
    run_training(four, 4)
    for found, expected in zip(curve(four), curve(one), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


def embedding_after_training(config: Path) -> str | None:
    """Runs on a rank: digest of this rank's copy of the shared embedding after the last step, if it has one."""
    built: list[SFTGPTModel] = []
    wrap = sft.engine.module.SFTGPT.wrap_chunks

    def spy(self: sft.engine.module.SFTGPT) -> None:
        built.extend(self.gpt)
        wrap(self)

    sft.engine.module.SFTGPT.wrap_chunks = spy  # type: ignore[method-assign]
    train(config)
    shared = [chunk for chunk in built if chunk.pre_process or chunk.post_process]
    if not shared:
        return None
    weight = shared[0].shared_embedding_or_output_weight()
    return hashlib.sha256(weight.detach().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"distributed": False}, marks=pytest.mark.slow)], ids=["distributed", "plain"]
)
def test_trap_13_tied_embedding_copies_stay_bitwise_equal(
    settings: dict[str, Any], tmp_path: Path, material: Material
) -> None:
    """After 8 steps, tp rank by tp rank. Seen to fail: without the embedding's all-reduce they part at once."""
    topology = {"tensor_parallel": 2, "pipeline_parallel": 2}
    paths = make_run(tmp_path, *material, ranks=4, topology=topology, max_steps=8, **settings)
    first, second, third, fourth = run_ranks(4, embedding_after_training, paths.config)
    assert (first, second) == (third, fourth)
    assert first != second


@dataclass(frozen=True, slots=True)
class Masks:
    """Digests of the masks that a rank drew, in order."""

    residual: list[str]
    attention: list[str]
    """One for each head."""


def dropout_masks(config: Path) -> tuple[tuple[int, int, int], Masks]:
    """Runs on a rank: its (tensor, pipeline, data) coordinates, and what dropout hid on it."""
    drawn = Masks([], [])
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def spy_dropout(inputs: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        kept = dropout(torch.ones_like(inputs), p, training)
        drawn.residual.append(_digest(kept == 0))
        return inputs * kept

    def spy_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        """The same numbers, by way of the attention weights: they are what comes out for the unit matrix."""
        unit = torch.eye(value.size(-2)).expand(*value.shape[:-1], -1)
        weights = attention(query, key, unit, **options)
        if value.size(-2) > 16:  # masks of a packed row's short padding can be alike by chance
            drawn.attention.extend(_digest(head) for head in (weights == 0).flatten(0, -3))
        return weights @ value.repeat_interleave(query.size(-3) // value.size(-3), dim=-3)

    F.dropout = spy_dropout  # type: ignore[assignment]
    F.scaled_dot_product_attention = spy_attention  # type: ignore[assignment]
    train(config)
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    return place, drawn


def _digest(mask: torch.Tensor) -> str:
    return hashlib.sha256(mask.numpy().tobytes()).hexdigest()


TENSOR = {"tensor_parallel": 2}
SEQUENCE = {**TENSOR, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("ranks", "topology", "settings", "times_drawn"),
    [
        (4, TENSOR, {}, ({1}, {1})),
        (4, SEQUENCE, {}, ({1}, {1})),
        pytest.param(4, {**TENSOR, "pipeline_parallel": 2}, {}, ({1}, {1}), marks=pytest.mark.slow),
        pytest.param(2, TENSOR, {"recompute": "selective"}, ({1}, {2}), marks=pytest.mark.slow),
        pytest.param(4, {**TENSOR, "context_parallel": 2}, {}, ({1}, {1}), marks=pytest.mark.slow),
        (2, TENSOR, {"recompute": "full", "packing": True}, ({1, 2}, {2})),
        (2, SEQUENCE, {"recompute": "full"}, ({1, 2}, {2})),
    ],
    ids=["tp2_dp2", "tp2_sp_dp2", "tp2_pp2", "selective", "tp2_cp2", "full_packed", "full_sp"],
)
def test_trap_15_dropout_masks(
    ranks: int,
    topology: dict[str, Any],
    settings: dict[str, Any],
    times_drawn: tuple[set[int], set[int]],
    tmp_path: Path,
    material: Material,
) -> None:
    """Equal where activations are replicated, different where activations differ; drawn alike when recomputed.

    `times_drawn` is how often each mask is drawn, of residual branches (the embedding's is never recomputed) and of
    attention. All examples are the same, so that masks have the same shape on all ranks.

    Seen to fail: with one seed for all ranks data parallel ranks and stages draw the same masks; with a seed of its own
    for each rank those of a tp group differ; without the stream of its own for attention, tensor parallel ranks hide
    the same of their different heads; with that stream under sequence parallel too, recomputed layers draw other masks.
    """
    same = write_jsonl(tmp_path / "same.jsonl", make_chat_rows(1, seed=3) * 16)
    paths = make_run(tmp_path, material[0], same, ranks=ranks, topology=topology, max_steps=1, **settings)
    config = paths.config.read_text()
    paths.config.write_text(re.sub(r"(hidden|attention)_dropout: 0.0", r"\1_dropout: 0.5", config))
    by_place = dict(run_ranks(ranks, dropout_masks, paths.config))
    for place, masks in by_place.items():
        assert set(Counter(masks.residual).values()) == times_drawn[0]
        assert set(Counter(masks.attention).values()) == times_drawn[1]
        for other, theirs in by_place.items():
            if other == place:
                continue
            assert not set(masks.attention) & set(theirs.attention)
            if other[1:] == place[1:] and not topology.get("sequence_parallel"):
                assert set(masks.residual) == set(theirs.residual)
            else:
                assert not set(masks.residual) & set(theirs.residual)
