"""Mixtures of experts under every kind of topology, and checkpoints of them that go on under another one.

Each family's logits and gradients are in test_families.py, which finds them in the registry.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 2
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1_recomputed": (1, {}, {"recompute": "full"}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp_norms_recomputed": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"recompute": "norms", "kernels": "fused"},
    ),
    "pp2_vpp2_packed": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"packing": True}),
    "cp2_packed_fused": (2, {"context_parallel": 2}, {"packing": True, "kernels": "fused"}),
    "dp2_distributed": (2, {}, {"distributed": True, "overlap": True}),
    "tp2_pp2_dp2_sp": (
        8,
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
        {"distributed": True, "packing": True},
    ),
}


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("material")
    chat = write_jsonl(root / "chat.jsonl", make_chat_rows(36, seed=3))
    return family_model(root / "model", "qwen3_moe"), chat


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    return reference_curve(tmp_path_factory.mktemp("reference"), *material, steps=STEPS, **RATE)


@pytest.mark.parametrize("layout", thinned(LAYOUTS, "tp2", "cp2_packed_fused", "dp2_distributed", "pp2_vpp2_packed"))
def test_layout_follows_reference(layout: str, tmp_path: Path, material: tuple[Path, Path], expected: Curve) -> None:
    ranks, topology, settings = LAYOUTS[layout]
    paths = make_run(tmp_path, *material, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(material[0]))[0], expected.gradients[0])


@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(1, {}, id="tp1"),
        pytest.param(2, {"pipeline_parallel": 2}, id="pp2"),
        pytest.param(4, {"tensor_parallel": 2}, id="tp2_dp2", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_under_another_topology(
    ranks: int, topology: dict[str, Any], tmp_path: Path, material: tuple[Path, Path]
) -> None:
    """Ranks of tp hold parts of every expert, which the checkpoint has whole."""
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, **RATE}
    first = {"tensor_parallel": 2, "sequence_parallel": True}
    full = make_run(tmp_path / "full", *material, ranks=2, topology=first, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", *material, ranks=ranks, topology=topology, **settings)
    shutil.copytree(full.checkpoint(2), paths.checkpoint(2))
    paths.metrics.write_text("".join(full.metrics.read_text().splitlines(keepends=True)[:2]))
    run_training(paths, ranks)
    whole, resumed = curve(full), curve(paths)
    assert resumed[0] == pytest.approx(whole[0], rel=1e-5)
    assert resumed[1] == pytest.approx(whole[1], rel=3e-5)
