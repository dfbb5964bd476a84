"""Sliding windows narrower than the rows: gradients under every layout, and nothing from a neighbour in packed rows.

What each family does by default stands in the tests that find families by the registry (test_families.py,
test_context_parallel.py, test_generation.py, test_lora.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_context_parallel import gradients_of_second, losses_by_place
from tests.parity.test_families import family_model
from tests.parity.test_grid import RATE, STEPS, assert_gradients_equal
from tests.parity.test_packing import first_steps, trace, trace_perturbed
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

FAMILIES = ("gemma2", "gemma3_text", "mistral")
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, topology, other settings)
    "tp1_padded": (1, {}, {"micro_batch_size": 2}),
    "tp1_fused_padded": (1, {}, {"micro_batch_size": 2, "kernels": "fused"}),
    "tp1_fused_packed": (1, {}, {"packing": True, "kernels": "fused"}),
    "dp2_packed": (2, {}, {"packing": True}),
    "vpp2_packed": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"packing": True}),
    "recompute": (1, {}, {"packing": True, "recompute": "full"}),
    "recompute_norms": (1, {}, {"packing": True, "recompute": "norms"}),
    "recompute_attention": (1, {}, {"packing": True, "recompute": "selective"}),
    "cp2_padded": (2, {"context_parallel": 2}, {"micro_batch_size": 2}),
    "cp4_packed": (4, {"context_parallel": 4}, {"packing": True}),
    "cp2_pp2_packed": (4, {"context_parallel": 2, "pipeline_parallel": 2}, {"packing": True}),
    "cp2_tp2_sp_fused": (
        4,
        {"context_parallel": 2, "tensor_parallel": 2, "sequence_parallel": True},
        {"packing": True, "kernels": "fused"},
    ),
}
DEFAULT = {("gemma3_text", "vpp2_packed"), ("gemma3_text", "cp2_padded"), ("gemma2", "tp1_fused_packed")}
CELLS = [
    pytest.param(family, layout, id=f"{family}-{layout}", marks=() if (family, layout) in DEFAULT else pytest.mark.slow)
    for family in FAMILIES
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine examples in steps of eight: the second step has one."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(9, seed=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: family_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Filled as they are asked for."""
    return {}


def reference_of(family: str, root: Path, models: dict[str, Path], chat: Path, known: dict[str, Curve]) -> Curve:
    if family not in known:
        known[family] = reference_curve(root / "reference", models[family], chat, steps=STEPS, **RATE)
    return known[family]


@pytest.mark.parametrize(("family", "layout"), CELLS)
def test_gradients_follow_reference(
    family: str, layout: str, tmp_path: Path, models: dict[str, Path], chat: Path, references: dict[str, Curve]
) -> None:
    """Seen to fail with windows of one position more."""
    ranks, topology, settings = LAYOUTS[layout]
    model = models[family]
    expected = reference_of(family, tmp_path, models, chat, references)
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for found, gradients in zip(join(by_rank, read_architecture(model)), expected.gradients, strict=True):
        assert_gradients_equal(found, gradients)


@pytest.mark.parametrize("family", thinned(FAMILIES, "gemma3_text"))
def test_a_neighbour_changes_no_loss(family: str, tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    """Bitwise, with other tokens in the first sequence of each packed row."""
    material = (models[family], chat)
    (plain,) = first_steps(tmp_path / "plain", material, 1, {}, trace, packing=True)
    (changed,) = first_steps(tmp_path / "changed", material, 1, {}, trace_perturbed, packing=True)
    assert len(plain) == len(changed) > 0
    for before, after in zip(plain, changed, strict=True):
        first = before.seq_lengths[0]
        assert first > 24  # wider than any window: the second sequence begins out of sight of most of the first
        assert before.losses[:first] != after.losses[:first]
        assert before.losses[first:] == after.losses[first:]


@pytest.mark.slow  # gradients of the same layout are compared above
def test_losses_of_rows_that_ranks_share(tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    """Position by position those of one rank."""
    material = (models["gemma3_text"], chat)
    (alone,) = first_steps(tmp_path / "alone", material, 1, {}, trace, packing=True, pad_to_multiple=4)
    topology = {"context_parallel": 2}
    by_rank = first_steps(tmp_path / "shared", material, 2, topology, losses_by_place, packing=True)
    for row, parts in zip(alone, zip(*by_rank, strict=True), strict=True):
        losses = {place: value for part in parts for place, value in part.items()}
        for _, place in row.sequences():
            assert [losses[number] for number in range(place.start, place.stop)] == pytest.approx(
                row.losses[place], abs=1e-5
            )


@pytest.mark.parametrize("tensor_parallel", thinned(["1", "2"], "1"))
def test_gemma_in_fp8_stays_near_fp32(
    tensor_parallel: str, tmp_path: Path, models: dict[str, Path], chat: Path, references: dict[str, Curve]
) -> None:
    """Products of GeGLU MLPs in fp8, as one operation, behind norms that multiply by 1 + weight."""
    size = int(tensor_parallel)
    expected = reference_of("gemma3_text", tmp_path, models, chat, references)
    settings = {"precision": "fp8", "kernels": "fused", "packing": True, **RATE}
    paths = make_run(
        tmp_path,
        models["gemma3_text"],
        chat,
        ranks=size,
        topology={"tensor_parallel": size},
        max_steps=STEPS,
        **settings,
    )
    run_training(paths, size)
    assert curve(paths)[0] != pytest.approx(expected.losses, rel=1e-6)  # fp8 was there
    assert curve(paths)[0] == pytest.approx(expected.losses, rel=2e-2)


def test_no_gradient_reaches_a_neighbour_across_ranks(tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    """Exactly 0, and in layers that see everything a loss reaches the whole sequence before it."""
    topology = {"context_parallel": 2}
    by_rank = first_steps(tmp_path, (models["gemma3_text"], chat), 2, topology, gradients_of_second, packing=True)
    for parts in zip(*by_rank, strict=True):
        lengths = parts[0][0]
        gradients = {place: value for _, part in parts for place, value in part.items()}
        second = range(lengths[0], lengths[0] + lengths[1])
        assert sorted(gradients) == list(range(sum(lengths)))
        assert all(gradients[place] > 0 for place in second[:-1])
        assert not any(value for place, value in gradients.items() if place not in second)
