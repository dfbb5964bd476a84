"""The grid: loss, gradient norm and every parameter's gradient equal one process of plain PyTorch and transformers.

Each cell trains nine examples in steps of eight: the second step has one example, so that with data parallelism there
are ranks without any supervised token, and everywhere else micro-batches without. The whole grid is `slow`; by
default each layout runs once padded or packed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 2
RATE = {"lr": 1e-4}
"""The second step's gradients are compared too; at a larger rate they differ by how AdamW treats rounding near 0."""
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, topology, other settings)
    "tp1": (1, {}, {}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "pp2": (2, {"pipeline_parallel": 2}, {}),
    "tp2_pp2": (4, {"tensor_parallel": 2, "pipeline_parallel": 2}, {}),
    "dp2": (2, {}, {}),
    "dp4": (4, {}, {}),
    "tp2_dp2_sp": (4, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "vpp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "recompute": (1, {}, {"recompute": "full"}),
    "recompute_norms": (1, {}, {"recompute": "norms"}),
    "tp2_sp_recompute_norms": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {"recompute": "norms"}),
}
FORMS: dict[str, dict[str, Any]] = {
    "padded_1": {"micro_batch_size": 1},
    "padded_2": {"micro_batch_size": 2},
    "packed": {"packing": True},
    "packed_tokens": {"packing": True, "global_batch_unit": "tokens", "global_batch_size": 512},
    "padded_tokens": {"micro_batch_size": 2, "global_batch_unit": "tokens", "global_batch_size": 512},
    "joined": {"packing": True, "micro_batch_size": 2},
    "fused": {"packing": True, "kernels": "fused"},
    "fused_padded": {"micro_batch_size": 2, "kernels": "fused"},
}
DEFAULT = {
    "tp1": ("padded_tokens", "joined", "fused_padded"),
    "tp2": ("joined", "fused_padded"),
    "pp2": ("padded_2", "packed"),
    "tp2_pp2": ("packed",),
    "dp2": ("padded_1", "packed_tokens"),
    "dp4": ("packed",),
    "tp2_dp2_sp": ("packed", "fused"),
    "vpp2": ("padded_1", "joined"),
    "recompute": ("fused",),
    "recompute_norms": ("padded_2", "fused"),
    "tp2_sp_recompute_norms": ("fused",),
}
CELLS = [
    pytest.param(layout, form, id=f"{layout}-{form}", marks=() if form in DEFAULT[layout] else (pytest.mark.slow,))
    for layout in LAYOUTS
    for form in FORMS
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(9, seed=3))


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory, model: Path, chat: Path) -> dict[str, Curve]:
    """By unit of the batch: nothing else changes what is to be computed."""
    batches: dict[str, dict[str, Any]] = {"examples": {}, "tokens": FORMS["packed_tokens"]}
    return {
        unit: reference_curve(tmp_path_factory.mktemp("reference"), model, chat, steps=STEPS, **RATE, **settings)
        for unit, settings in batches.items()
    }


@pytest.mark.parametrize(("layout", "form"), CELLS)
def test_trap_1_gradients_follow_reference(
    layout: str, form: str, tmp_path: Path, model: Path, chat: Path, references: dict[str, Curve]
) -> None:
    """Seen to fail with Megatron-core's default, `calculate_per_token_loss=False`: a mean of means."""
    ranks, topology, settings = LAYOUTS[layout]
    expected = references[FORMS[form].get("global_batch_unit", "examples")]
    paths = make_run(
        tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **settings, **FORMS[form]
    )
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-5)
    found = join(by_rank, read_architecture(model))
    assert len(found) == STEPS
    for step, gradients in enumerate(found):
        assert_gradients_equal(gradients, expected.gradients[step])


def assert_gradients_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Each within 1e-5 of its own norm: single elements near 0 are sums of large ones that cancel."""
    assert found.keys() == expected.keys()
    tiny = 1e-30  # an expert without tokens has no gradient on either side
    errors = {
        name: float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(tiny)) for name in expected
    }
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
