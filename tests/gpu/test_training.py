"""The rank main on one CUDA device: the same code, the same numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_memory_copies import Disturbed
from tests.tiny_model import FLASH4_HEAD_DIM, make_material

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

STEPS = 30


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 100, head_dim=FLASH4_HEAD_DIM)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    """fp32 on the CPU, plain PyTorch and transformers, at a rate at which rounding does not grow."""
    return reference_curve(tmp_path_factory.mktemp("reference"), *material, steps=STEPS, lr=1e-3)


def test_fp32_follows_reference(tmp_path: Path, material: tuple[Path, Path], reference: Curve) -> None:
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=STEPS, lr=1e-3)
    run_training(paths, 1)
    losses, norms = curve(paths)
    assert losses == pytest.approx(reference.losses, rel=1e-4)
    assert norms[:5] == pytest.approx(reference.grad_norms[:5], rel=1e-4)


def test_bf16_stays_near_fp32(tmp_path: Path, material: tuple[Path, Path], reference: Curve) -> None:
    """Trap 22: fp32 master weights keep small updates; the residual has no drift."""
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=STEPS, lr=1e-3, precision="bf16")
    run_training(paths, 1)
    residuals = [found - expected for found, expected in zip(curve(paths)[0], reference.losses, strict=True)]
    assert max(map(abs, residuals)) < 5e-2
    assert abs(sum(residuals) / STEPS) < 5e-3


def test_fp8_stays_near_fp32(tmp_path: Path, material: tuple[Path, Path], reference: Curve) -> None:
    """As near as the same products emulated on a CPU, whose mean residual is 0.024 in a model of 64 dimensions."""
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=STEPS, lr=1e-3, precision="fp8")
    run_training(paths, 1)
    residuals = [found - expected for found, expected in zip(curve(paths)[0], reference.losses, strict=True)]
    assert max(map(abs, residuals)) < 1e-1
    assert abs(sum(residuals) / STEPS) < 4e-2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_resume_is_bitwise(precision: str, tmp_path: Path, material: tuple[Path, Path]) -> None:
    settings = {"gpus_per_node": 1, "max_steps": 8, "every": 4, "keep_last": 9, "precision": precision}
    full = make_run(tmp_path, *material, ranks=1, name="full", **settings)
    run_training(full, 1)
    paths = make_run(tmp_path, *material, ranks=1, name="resumed", **settings)
    shutil.copytree(full.checkpoint(4), paths.checkpoint(4))
    shutil.copy(full.metrics, paths.metrics)
    run_training(paths, 1)
    assert curve(paths) == curve(full)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_run_goes_on_from_a_copy_in_memory(precision: str, tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Bit by bit: the device's random generator and step counts are in it, and weights are rounded master weights."""
    run = Disturbed(tmp_path, material, (1, 1, {}), gpus_per_node=1, precision=precision)
    assert run.goes_on() == 4


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 2e-2)])
def test_packed_follows_reference(
    precision: str, tolerance: float, tmp_path: Path, material: tuple[Path, Path], reference: Curve
) -> None:
    """fp32 takes sequences one by one, bf16 the kernel for sequences of different lengths."""
    settings = {"gpus_per_node": 1, "max_steps": STEPS, "lr": 1e-3, "packing": True, "precision": precision}
    paths = make_run(tmp_path, *material, ranks=1, **settings)
    run_training(paths, 1)
    assert curve(paths)[0] == pytest.approx(reference.losses, rel=tolerance)
