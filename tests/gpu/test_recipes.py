"""Recipes on one CUDA device: fp32 follows transformers and PEFT with plain and with fused kernels, bf16 stays near."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parity.runs import curve, make_run, run_training
from tests.parity.test_lora import lora_run
from tests.parity.test_recipes import FULL, LORA, LORA_SETTINGS, STEPS, Curve, full_curve, peft_curve
from tests.tiny_model import FLASH4_HEAD_DIM, make_material

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]

CASES: dict[str, tuple[dict[str, Any], int, float]] = {
    "plain": ({"kernels": "plain"}, STEPS, 1e-4),
    "fused": ({"kernels": "fused"}, STEPS, 1e-4),
    "fused_packed": ({"kernels": "fused", "packing": True}, STEPS, 1e-4),
    # The last step of the full recipe has a gradient norm of 13, where rounding grows.
    "bf16": ({"kernels": "fused", "precision": "bf16"}, STEPS - 1, 2e-2),
}
"""Settings, the steps that are compared, and how near their losses are."""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 36, head_dim=FLASH4_HEAD_DIM)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    return full_curve(make_run(tmp_path_factory.mktemp("full"), *material, ranks=1, max_steps=STEPS, **FULL))


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, material: tuple[Path, Path]) -> Curve:
    root = tmp_path_factory.mktemp("adapters")
    return peft_curve(lora_run(root, *material, LORA, ranks=1, max_steps=STEPS, **LORA_SETTINGS), LORA)


@pytest.mark.parametrize("name", CASES)
def test_full_recipe(name: str, tmp_path: Path, material: tuple[Path, Path], full: Curve) -> None:
    settings, steps, tolerance = CASES[name]
    paths = make_run(tmp_path, *material, ranks=1, gpus_per_node=1, max_steps=STEPS, **FULL, **settings)
    run_training(paths, 1)
    assert curve(paths)[0][:steps] == pytest.approx(full.losses[:steps], rel=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_dora_rslora_and_loraplus(name: str, tmp_path: Path, material: tuple[Path, Path], adapters: Curve) -> None:
    settings, steps, tolerance = CASES[name]
    settings = {**LORA_SETTINGS, **settings, "gpus_per_node": 1}
    paths = lora_run(tmp_path, *material, LORA, ranks=1, max_steps=STEPS, **settings)
    run_training(paths, 1)
    assert curve(paths)[0][:steps] == pytest.approx(adapters.losses[:steps], rel=tolerance)
