"""Latent attention under what test_families.py does not give it: adapters of latents, checkpoints, recomputation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.spec import LoraSpec
from sft.hf.adapter import all_targets
from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.runs import curve, expect_same_end, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, SHORT, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.parity.test_lora import STEADY, STEPS, adapted, expect_curve, expected_curve, lora_run
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

SP = {"tensor_parallel": 2, "sequence_parallel": True}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def deepseek(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_model(tmp_path_factory.mktemp("model") / "deepseek", "deepseek_v3")


def of_attention(model: Path, lora: LoraSpec) -> LoraSpec:
    """Adapters of every linear layer of attention."""
    every = all_targets(read_architecture(model), lora)
    names = [target.name for target in every if target.linear.startswith("self_attention.")]
    assert {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"} == set(names)
    return dataclasses.replace(lora, targets=list(dict.fromkeys(names)))


def test_adapters_of_latents_under_sequence_parallel(tmp_path: Path, chat: Path, deepseek: Path) -> None:
    """Each rank has them whole and sees its part of the sequence: gradients are partial sums. Seen to fail with A and B
    split over ranks, and without the marks by which the sums are added up."""
    lora = of_attention(deepseek, LoraSpec(rank=2))
    expected = expected_curve(
        tmp_path / "reference", deepseek, chat, lambda spec: adapted(deepseek, lora, spec.train.seed), **STEADY
    )
    settings: dict[str, Any] = {"topology": SP, "packing": True, "max_steps": STEPS, **STEADY}
    paths = lora_run(tmp_path, deepseek, chat, lora, ranks=2, **settings)
    run_training(paths, 2)
    expect_curve(paths, expected)


@pytest.mark.slow  # the same module as by default, in other settings
@pytest.mark.parametrize(
    ("ranks", "topology", "changes"),
    [
        pytest.param(1, {}, {"dora": True}, id="tp2_sp to tp1, DoRA"),
        pytest.param(2, {"pipeline_parallel": 2}, {"rslora": True}, id="tp2_sp to pp2, rsLoRA"),
    ],
)
def test_adapters_go_on_under_another_topology(
    ranks: int, topology: dict[str, Any], changes: dict[str, Any], tmp_path: Path, chat: Path, deepseek: Path
) -> None:
    lora = of_attention(deepseek, LoraSpec(rank=2, **changes))
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, **STEADY}
    full = lora_run(tmp_path / "full", deepseek, chat, lora, ranks=2, topology=SP, **settings)
    run_training(full, 2)
    paths = lora_run(tmp_path / "other", deepseek, chat, lora, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


@pytest.mark.slow  # of unequal layers test_expert_families.py has one by default
@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(1, {}, id="tp1"),
        pytest.param(2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, id="pp2_vpp2"),
        pytest.param(2, {"expert_parallel": 2}, id="ep2"),
    ],
)
def test_a_checkpoint_goes_on_under_another_topology(
    ranks: int, topology: dict[str, Any], tmp_path: Path, chat: Path, deepseek: Path
) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, "distributed": True, **RATE}
    full = make_run(tmp_path / "full", deepseek, chat, ranks=2, topology=SP, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", deepseek, chat, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


@pytest.mark.slow  # the grid of recomputation is Llama's
@pytest.mark.parametrize("recompute", ["selective", "norms", "full"])
@pytest.mark.parametrize("case", ["deepseek_v3", "deepseek_v3_no_query_latent"])
def test_recomputation_changes_no_gradient(case: str, recompute: str, tmp_path: Path, chat: Path) -> None:
    model = family_model(tmp_path / "model", case)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=2, **SHORT)
    settings: dict[str, Any] = {"topology": SP, "packing": True, "recompute": recompute, "max_steps": 2, **SHORT}
    paths = make_run(tmp_path, model, chat, ranks=2, kernels="fused", **settings)
    by_rank = run_training(paths, 2, function=train_and_capture)
    assert curve(paths)[0] == pytest.approx(expected.losses, rel=1e-5)
    assert_gradients_equal(join(by_rank, read_architecture(model))[0], expected.gradients[0])
