"""Mixtures of experts under every kind of topology, and checkpoints of them that go on under another one.

Each family's logits and gradients are in test_families.py, which finds them in the registry.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, expect_same_end, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 2
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1_recomputed": (1, {}, {"recompute": "full"}),
    "tp1_attention_recomputed": (1, {}, {"recompute": "selective", "packing": True, "kernels": "fused"}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp_norms_recomputed": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"recompute": "norms", "kernels": "fused"},
    ),
    "pp2_vpp2_packed": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"packing": True}),
    "cp2_packed_fused": (2, {"context_parallel": 2}, {"packing": True, "kernels": "fused"}),
    "dp2_distributed": (2, {}, {"distributed": True, "overlap": True}),
    "ep2": (2, {"expert_parallel": 2}, {"recompute": "full"}),
    "ep2_packed_distributed": (
        2,
        {"expert_parallel": 2},
        {"packing": True, "distributed": True, "overlap": True, "kernels": "fused"},
    ),
    "ep2_tp2_sp_etp1": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2, "expert_tensor_parallel": 1},
        {},
    ),
    "ep2_cp2": (2, {"context_parallel": 2, "expert_parallel": 2}, {"packing": True}),
    "tp2_sp_etp1": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_tensor_parallel": 1},
        {"distributed": True},
    ),
    "ep2_pp2_dp2": (4, {"pipeline_parallel": 2, "expert_parallel": 2}, {"packing": True, "distributed": True}),
    "tp2_dp2_ep2": (4, {"tensor_parallel": 2, "expert_parallel": 2}, {}),
    "ep4_tp2_sp_etp1": (
        4,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 4, "expert_tensor_parallel": 1},
        {"packing": True},
    ),
    "ep8": (8, {"expert_parallel": 8}, {}),
    "tp2_pp2_dp2_sp": (
        8,
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
        {"distributed": True, "packing": True},
    ),
}


DEFAULT = ("cp2_packed_fused", "ep2_packed_distributed", "ep2_tp2_sp_etp1")


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("material")
    chat = write_jsonl(root / "chat.jsonl", make_chat_rows(36, seed=3))
    return family_model(root / "model", "qwen3_moe"), chat


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    return reference_curve(tmp_path_factory.mktemp("reference"), *material, steps=STEPS, **RATE)


@pytest.mark.parametrize("layout", thinned(LAYOUTS, *DEFAULT))
def test_layout_follows_reference(layout: str, tmp_path: Path, material: tuple[Path, Path], expected: Curve) -> None:
    ranks, topology, settings = LAYOUTS[layout]
    paths = make_run(tmp_path, *material, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(material[0]))[0], expected.gradients[0])


TP2 = (2, {"tensor_parallel": 2, "sequence_parallel": True})
EP2 = (2, {"expert_parallel": 2})
EP2_PP2_DP2 = (8, {"expert_parallel": 2, "pipeline_parallel": 2})
EP4 = (4, {"expert_parallel": 4})


@pytest.mark.parametrize(
    "distributed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["distributed", "plain"]
)
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param(TP2, (2, {"pipeline_parallel": 2}), id="tp2_to_pp2", marks=pytest.mark.slow),
        pytest.param(EP2, TP2, id="ep2_to_tp2"),
        pytest.param(TP2, EP2, id="tp2_to_ep2", marks=pytest.mark.slow),
        pytest.param(EP2, (1, {}), id="ep2_to_one", marks=pytest.mark.slow),
        pytest.param(EP2_PP2_DP2, EP4, id="ep2_pp2_dp4_to_ep4", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_goes_on_under_another_topology(
    first: tuple[int, dict[str, Any]],
    second: tuple[int, dict[str, Any]],
    distributed: bool,
    tmp_path: Path,
    material: tuple[Path, Path],
) -> None:
    """Ranks hold parts of every expert, or some of the experts, all of which the checkpoint has whole."""
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, "packing": True, **RATE}
    settings |= {"distributed": distributed}
    (before, topology), (ranks, other) = first, second
    full = make_run(tmp_path / "full", *material, ranks=before, topology=topology, **settings)
    run_training(full, before)
    paths = make_run(tmp_path / "other", *material, ranks=ranks, topology=other, **settings)
    expect_same_end(full, paths, ranks)
