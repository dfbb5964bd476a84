"""Ranks that share rows train what one process of plain PyTorch trains: losses, norms, every parameter's gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.hf.architecture import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_grid import RATE, STEPS, assert_gradients_equal
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

CP2 = {"context_parallel": 2}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "cp2": (2, CP2),
    "cp4": (4, {"context_parallel": 4}),
    "cp2_tp2": (4, {**CP2, "tensor_parallel": 2}),
    "cp2_tp2_sp": (4, {**CP2, "tensor_parallel": 2, "sequence_parallel": True}),
    "cp2_pp2": (4, {**CP2, "pipeline_parallel": 2}),
    "cp2_vpp2": (4, {**CP2, "pipeline_parallel": 2, "virtual_pipeline": 2}),
    "cp2_dp2": (4, CP2),
    "cp2_tp2_pp2_sp": (8, {**CP2, "tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True}),
}
FORMS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": 2},
    "packed": {"packing": True},
    "joined": {"packing": True, "micro_batch_size": 2},
    "fused_padded": {"micro_batch_size": 2, "kernels": "fused"},
    "fused_packed": {"packing": True, "kernels": "fused"},
    "recomputed": {"packing": True, "recompute": "full"},
    "recomputed_attention": {"micro_batch_size": 2, "recompute": "selective", "kernels": "fused"},
    "plain_optimizer": {"packing": True, "distributed": False},
}
DEFAULT = {
    "cp2": ("padded", "packed", "fused_padded", "fused_packed", "recomputed_attention"),
    "cp2_tp2_sp": ("packed", "fused_padded"),
    "cp2_pp2": ("padded", "fused_packed"),
    "cp2_dp2": ("packed",),
}
CELLS = [
    pytest.param(layout, form, id=f"{layout}-{form}", marks=() if form in DEFAULT.get(layout, ()) else pytest.mark.slow)
    for layout in LAYOUTS
    for form in FORMS
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Nine examples in steps of eight: in the second step most ranks have nothing to learn from."""
    return make_material(tmp_path_factory.mktemp("material"), 9)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    return reference_curve(tmp_path_factory.mktemp("reference"), *material, steps=STEPS, **RATE)


@pytest.mark.parametrize(("layout", "form"), CELLS)
def test_gradients_follow_reference(
    layout: str, form: str, tmp_path: Path, material: tuple[Path, Path], reference: Curve
) -> None:
    ranks, topology = LAYOUTS[layout]
    paths = make_run(tmp_path, *material, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **FORMS[form])
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    assert norms == pytest.approx(reference.grad_norms, rel=1e-5)
    for found, expected in zip(join(by_rank, read_architecture(material[0])), reference.gradients, strict=True):
        assert_gradients_equal(found, expected)
