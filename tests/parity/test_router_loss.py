"""The loss that evens out the use of experts, and the numbers about them: of one definition under every layout.

The reference computes it from what transformers' routers return, one example after another.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from launcher.contract.errors import ModelError
from launcher.contract.rundir import RunPaths, read_lines
from launcher.contract.spec import read_resolved, to_yaml
from sft.data.prepared.prepare import open_or_build
from sft.data.prepared.schedule import batch_schedule
from sft.engine.routing import AUX_LOSS, NUMBERS
from sft.hf.checks import check_model_settings
from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve, RouterWatch
from tests.parity.runs import curve, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

STEPS = 2
STRONG: dict[str, Any] = {**RATE, "router_aux_loss": 0.5}
"""A third of the routers' gradients and more."""
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "tp1": (1, {}, {"micro_batch_size": 2}),
    "tp1_fused_joined": (1, {}, {"micro_batch_size": 2, "packing": True, "kernels": "fused"}),
    "tp1_recomputed": (1, {}, {"recompute": "full", "packing": True}),
    "tp2": (2, {"tensor_parallel": 2}, {}),
    "tp2_sp_packed": (2, {"tensor_parallel": 2, "sequence_parallel": True}, {"packing": True}),
    "tp2_sp_fused_recomputed": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True},
        {"kernels": "fused", "recompute": "full", "micro_batch_size": 2},
    ),
    "pp2_vpp2_recomputed": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"recompute": "full"}),
    "cp2": (2, {"context_parallel": 2}, {"micro_batch_size": 2}),
    "cp2_packed_fused": (2, {"context_parallel": 2}, {"packing": True, "kernels": "fused"}),
    "dp2_packed": (2, {}, {"packing": True, "distributed": True}),
    "ep2_packed_fused": (2, {"expert_parallel": 2}, {"packing": True, "kernels": "fused", "recompute": "full"}),
    "tp2_sp_ep2_etp1": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2, "expert_tensor_parallel": 1},
        {"micro_batch_size": 2},
    ),
    "tp2_pp2_dp2_sp": (
        8,
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
        {"distributed": True, "packing": True},
    ),
}
FAMILIES = ("qwen3_moe", "glm4_moe")
"""Softmax of the logits; sigmoids, a bias, groups, and a first layer without experts."""
CELLS = [f"{layout}-{family}" for family in FAMILIES for layout in LAYOUTS]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: family_model(tmp_path_factory.mktemp("model") / name, name) for name in FAMILIES}


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], chat: Path
) -> dict[tuple[str, bool], Curve]:
    """By family, with the loss and without it."""
    return {
        (name, strong): reference_curve(
            tmp_path_factory.mktemp("reference"), model, chat, steps=STEPS, **(STRONG if strong else RATE)
        )
        for name, model in models.items()
        for strong in (True, False)
    }


@pytest.fixture(scope="module")
def numbers(
    tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], chat: Path
) -> dict[str, dict[int, dict[str, float]]]:
    """By family and expert parallel ranks, those of the first step by their definitions."""
    return {name: numbers_of(tmp_path_factory.mktemp("numbers"), model, chat) for name, model in models.items()}


def numbers_of(root: Path, directory: Path, chat: Path) -> dict[int, dict[str, float]]:
    spec = read_resolved(make_run(root, directory, chat, ranks=1, **STRONG).config)
    cache = open_or_build(spec, directory, build=True).train
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    routers = RouterWatch(model)
    seen = []
    with torch.no_grad():
        for example in batch_schedule(spec, cache, shuffle=True).examples_at(0).tolist():
            model(torch.tensor(cache.tokens(example)[0], dtype=torch.int64)[None])
            seen.append(routers.take())
    by_layer = [[torch.cat(parts) for parts in zip(*layer, strict=True)] for layer in zip(*seen, strict=True)]
    count = by_layer[0][0].size(-1)
    loads = torch.stack([torch.bincount(chosen.flatten(), minlength=count) for _, _, chosen in by_layer]).double()
    entropies = [-(probabilities * probabilities.log()).sum(-1).mean() for _, probabilities, _ in by_layer]
    same = {
        "router/expert_load": float((loads.amax(1) / loads.mean(1)).max()),
        "router/entropy": float(torch.stack(entropies).mean()) / math.log(count),
        "router/dead_experts": float((loads == 0).sum()),
        "router/max_logit": float(torch.stack([logits.max() for logits, _, _ in by_layer]).max()),
    }
    by_rank = {ranks: loads.view(len(loads), ranks, -1).sum(-1) for ranks in (1, 2)}
    return {
        ranks: same | {"router/rank_load": float((load.amax(1) / load.mean(1)).max())}
        for ranks, load in by_rank.items()
    }


def lines(paths: RunPaths) -> list[dict[str, Any]]:
    return [line for line in read_lines(paths.metrics) if "loss" in line]


@pytest.mark.parametrize(
    "cell",
    thinned(
        CELLS,
        "tp1-glm4_moe",
        "tp2_sp_fused_recomputed-qwen3_moe",
        "cp2_packed_fused-glm4_moe",
        "pp2_vpp2_recomputed-glm4_moe",
        "dp2_packed-qwen3_moe",
        "ep2_packed_fused-qwen3_moe",
    ),
)
def test_layout_follows_reference(
    cell: str,
    tmp_path: Path,
    models: dict[str, Path],
    chat: Path,
    expected: dict[tuple[str, bool], Curve],
    numbers: dict[str, dict[int, dict[str, float]]],
) -> None:
    layout, family = cell.split("-")
    ranks, topology, settings = LAYOUTS[layout]
    model, wanted = models[family], expected[family, True]
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **STRONG, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(wanted.losses, rel=1e-5)
    assert norms == pytest.approx(wanted.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(model))[0], wanted.gradients[0])
    assert [line["router/aux_loss"] for line in lines(paths)] == pytest.approx(wanted.balance, rel=1e-5)
    first = {name: lines(paths)[0][name] for name in NUMBERS if name != AUX_LOSS}
    assert first == pytest.approx(numbers[family][topology.get("expert_parallel", 1)], rel=1e-5)


def test_the_loss_is_part_of_the_gradients(expected: dict[tuple[str, bool], Curve]) -> None:
    """So that the test above cannot pass without it."""
    for family, name in (
        ("qwen3_moe", "model.layers.1.mlp.gate.weight"),
        ("glm4_moe", "model.layers.1.mlp.gate.weight"),
    ):
        strong, weak = (expected[family, on].gradients[0][name] for on in (True, False))
        assert (strong - weak).norm() > 0.3 * weak.norm()
        assert expected[family, True].balance[0] > 1.01


def test_numbers_of_logged_steps_alone(tmp_path: Path, models: dict[str, Path], chat: Path) -> None:
    """Those that need no coefficient are there without one."""
    paths = make_run(tmp_path, models["qwen3_moe"], chat, ranks=1, max_steps=3)
    spec = read_resolved(paths.config)
    logging = dataclasses.replace(spec.logging, every=2, tensorboard=True)
    paths.config.write_text(to_yaml(dataclasses.replace(spec, logging=logging)))
    run_training(paths, 1)
    assert [line["step"] for line in lines(paths)] == [2, 3]
    assert any((paths.root / "tensorboard").iterdir())
    for line in lines(paths):
        assert line.keys() >= set(NUMBERS) - {AUX_LOSS}
        assert AUX_LOSS not in line
        assert line["router/expert_load"] > 1


def test_a_model_without_experts_is_refused(tmp_path: Path, chat: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    paths = make_run(tmp_path, model, chat, ranks=1, **STRONG)
    with pytest.raises(ModelError) as caught:
        check_model_settings(read_resolved(paths.config), read_architecture(model))
    assert str(caught.value) == (
        "train.router_aux_loss 0.5: a llama model has no experts to use more evenly; set it to 0"
    )
