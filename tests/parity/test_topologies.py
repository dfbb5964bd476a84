"""Every layout trains the same model: losses and gradient norms equal one process of plain PyTorch and transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import sft.engine.module
from sft.megatron.core import parallel_state
from sft.training.trainer import train
from tests.parity.reference import Curve
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.ranks import run_ranks
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 3
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, topology, other settings)
    "tp1": (1, {}, {}),
    "tp1_micro_batch_2": (1, {}, {"micro_batch_size": 2}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {}),
    "pp2": (2, {"pipeline_parallel": 2}, {}),
    "pp2_vpp2": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "dp2": (2, {}, {}),
    "dp2_plain_optimizer": (2, {}, {"distributed": False}),
    "dp4_micro_batch_2": (4, {}, {"micro_batch_size": 2}),
    "tp2_pp2_dp2_sp": (8, {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True}, {}),
    "dp2_overlap": (2, {}, {"overlap": True}),
    "dp2_overlap_fused_packed": (2, {}, {"overlap": True, "kernels": "fused", "packing": True, "seq_length": 256}),
    "tp2_dp2_overlap_fused": (4, {"tensor_parallel": 2}, {"overlap": True, "kernels": "fused"}),
    "recompute_full": (1, {}, {"recompute": "full"}),
    "recompute_offload": (1, {}, {"recompute": "offload"}),
    "recompute_selective": (1, {}, {"recompute": "selective"}),
    "recompute_norms": (1, {}, {"recompute": "norms"}),
}
IN_THE_GRID = {"tp1", "tp1_micro_batch_2", "tp2", "pp2", "dp2", "recompute_full", "recompute_norms"}
"""By default test_grid.py stands for them."""
FAMILIES = {"llama": {}, "llama_tied": {"tied": True}, "qwen2": {"family": "qwen2"}, "qwen3": {"family": "qwen3"}}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 conversations: with batches of 8, the third step is short of examples."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(20, seed=3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, model: Path, chat: Path) -> Curve:
    return reference_curve(tmp_path_factory.mktemp("reference"), model, chat, steps=STEPS)


@pytest.mark.parametrize("name", thinned(LAYOUTS, *(LAYOUTS.keys() - IN_THE_GRID)))
def test_layout_follows_reference(name: str, tmp_path: Path, model: Path, chat: Path, reference: Curve) -> None:
    ranks, topology, settings = LAYOUTS[name]
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **settings)
    run_training(paths, ranks)
    losses, norms = curve(paths)
    assert losses == pytest.approx(reference.losses, rel=1e-5)
    assert norms == pytest.approx(reference.grad_norms, rel=1e-5)


@pytest.mark.parametrize("family", thinned(FAMILIES, "llama_tied", "qwen2"))
def test_trap_14_family_follows_reference_under_tp2_pp2(family: str, tmp_path: Path, chat: Path) -> None:
    """Seen to fail when the rows that pad the vocabulary stay in the softmax."""
    model = make_tiny_model(tmp_path / "model", **FAMILIES[family])
    expected = reference_curve(tmp_path / "reference", model, chat, steps=STEPS)
    topology = {"tensor_parallel": 2, "pipeline_parallel": 2}
    paths = make_run(tmp_path, model, chat, ranks=4, topology=topology, max_steps=STEPS)
    run_training(paths, 4)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=2e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=5e-5)


@pytest.mark.parametrize("name", ["tp1", "tp2", "pp2"])
def test_target_losses_of_first_step_equal_transformers(
    name: str, tmp_path: Path, model: Path, chat: Path, reference: Curve
) -> None:
    ranks, topology, _ = LAYOUTS[name]
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=1)
    by_rank = run_ranks(ranks, losses_of_targets, paths.config)
    found = next(losses for losses in by_rank if losses)
    expected = list(reference.first_step.values())
    assert len(found) == len(expected)
    for row, losses in zip(found, expected, strict=True):
        assert row[: len(losses)] == pytest.approx(losses, abs=1e-4)


def losses_of_targets(config: Path) -> list[list[float]]:
    """Runs on a rank: the loss of each position as the last stage computes it, by example (micro-batches of 1)."""
    seen: list[list[float]] = []
    weighted_sum = sft.engine.module._weighted_sum

    def spy(weights: torch.Tensor, losses: torch.Tensor) -> Any:
        seen.append(losses.detach().flatten().tolist())
        return weighted_sum(weights, losses)

    sft.engine.module._weighted_sum = spy
    train(config)
    assert bool(seen) == parallel_state.is_pipeline_last_stage()
    return seen


def train_and_count_offloads(config: Path) -> int:
    """Runs on a rank: how many tensors of the size of a layer's input were sent to the host."""
    sent = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        sent.append(tensor.ndim)
        return tensor

    def hooks(pin_memory: bool = False) -> torch.autograd.graph.saved_tensors_hooks:
        assert pin_memory
        return torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)

    torch.autograd.graph.save_on_cpu = hooks  # type: ignore[assignment,misc]
    train(config)
    return sent.count(3)


def test_offload_sends_the_inputs_of_layers_and_little_more(tmp_path: Path, model: Path, chat: Path) -> None:
    """Of four layers in eight micro-batches of one step; without recomputation there would be hundreds."""
    paths = make_run(tmp_path, model, chat, ranks=1, max_steps=1, recompute="offload", kernels="fused")
    (sent,) = run_ranks(1, train_and_count_offloads, paths.config)
    assert 4 * 8 <= sent <= 10 * 8
