"""Families and adapters on one CUDA device: the same numbers as plain PyTorch on the CPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.models.registry import SUPPORTED, read_architecture
from tests.parity.gradients import join, largest_differences, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_lora import ALL, STEADY, STEPS, adapted, expected_curve, lora_run
from tests.tiny_model import FLASH4_HEAD_DIM, make_chat_rows, write_jsonl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here"),
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


NEAR = 2e-5
"""A margin of a router that a GPU's rounding may cross: a token then has another expert, and losses differ by 1e-4 to
1e-3 from that step on. Where nothing crosses one they differ by 1e-6."""


def without_near_ties(root: Path, model: Path) -> tuple[Path, Curve]:
    """The first of some data on which no router of the reference is near a tie, and the reference's training."""
    for seed in range(3, 40):
        data = root / f"data-{seed}"
        data.mkdir()
        chat = write_jsonl(data / "chat.jsonl", make_chat_rows(36, seed=seed))
        expected = reference_curve(data / "reference", model, chat, steps=STEPS, **RATE)
        if min(expected.margins) > NEAR:
            return chat, expected
    raise AssertionError("every one of them has a near tie")


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_family_follows_reference(family: str, precision: str, tmp_path: Path) -> None:
    """In fp32 with every gradient of the first step; what differs most in each is printed, and shown of a failure."""
    model = family_model(tmp_path / "model", family)
    chat, expected = without_near_ties(tmp_path, model)
    full = dataclasses.replace(ALL, rank=None, alpha=None)
    settings: dict[str, Any] = {"max_steps": STEPS, "precision": precision, **RATE}
    paths = lora_run(tmp_path, model, chat, full, ranks=1, gpus_per_node=1, **settings)
    by_rank = run_training(paths, 1, function=train_and_capture)
    losses, exact = curve(paths)[0], precision == "fp32"
    gradients = join(by_rank, read_architecture(model))
    differences = [largest_differences(*pair) for pair in zip(gradients, expected.gradients, strict=True)]
    for step, largest in enumerate(differences):
        print(f"step {step + 1}: loss {losses[step]:.7g}, expected {expected.losses[step]:.7g}")
        print(f"    smallest margin of a router {expected.margins[step]:.1e}")
        print("".join(f"    {difference:.1e} {name}\n" for name, difference in largest.items()))
    assert losses == pytest.approx(expected.losses, rel=1e-4 if exact else 2e-2)
    assert not exact or max(differences[0].values()) < 1e-4


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_lora_follows_reference(precision: str, recompute: str, tmp_path: Path, chat: Path) -> None:
    model = family_model(tmp_path / "model", "phi3")
    expected = expected_curve(tmp_path / "reference", model, chat, lambda spec: adapted(model, ALL, spec.train.seed))
    paths = lora_run(
        tmp_path, model, chat, ALL, ranks=1, gpus_per_node=1, max_steps=STEPS, precision=precision, recompute=recompute
    )
    run_training(paths, 1)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-4 if precision == "fp32" else 2e-2)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-3 if precision == "fp32" else 1e-1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_of_experts_in_one_tensor_follow_peft(precision: str, tmp_path: Path) -> None:
    """gpt-oss, on data without near ties. In bf16 with ranks and sizes that torch's grouped product takes."""
    pytest.importorskip("peft")
    from tests.parity.test_joined_experts import peft_model  # skips as a whole without PEFT

    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(36, seed=7))
    model, lora = family_model(tmp_path / "model", "gpt_oss"), dataclasses.replace(ALL, rank=8)
    settings: dict[str, Any] = {"max_steps": STEPS, **STEADY}
    expected = expected_curve(
        tmp_path / "reference", model, chat, lambda spec: peft_model(model, spec.train.seed, rank=8), **STEADY
    )
    paths = lora_run(tmp_path, model, chat, lora, ranks=1, gpus_per_node=1, precision=precision, **settings)
    run_training(paths, 1)
    losses, norms = curve(paths)
    print(f"smallest margins of routers {expected.margins}")  # shown of a failure
    assert losses == pytest.approx(expected.losses, rel=1e-4 if precision == "fp32" else 2e-2)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-3 if precision == "fp32" else 1e-1)


def test_lora_over_fp8_stays_near_fp32(tmp_path: Path, chat: Path) -> None:
    """Frozen products in fp8 by the GPU's library, adapters in bf16, in fused layers."""
    model = family_model(tmp_path / "model", "llama", head_dim=FLASH4_HEAD_DIM)
    expected = expected_curve(tmp_path / "reference", model, chat, lambda spec: adapted(model, ALL, spec.train.seed))
    settings = {"precision": "fp8", "kernels": "fused", "packing": True}
    paths = lora_run(tmp_path, model, chat, ALL, ranks=1, gpus_per_node=1, max_steps=STEPS, **settings)
    run_training(paths, 1)
    assert curve(paths)[0] == pytest.approx(expected.losses, rel=3e-2)
