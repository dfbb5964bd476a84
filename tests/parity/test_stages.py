"""Stages of unequal numbers of layers train the same model, and their checkpoints go on under any other split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.checkpoint.contents import TrainerState
from sft.hf.exporter import export_checkpoint
from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.runs import copy_start, curve, expect_same_end, make_run, reference_curve, run_training
from tests.parity.test_families import RATE, family_model
from tests.parity.test_grid import assert_gradients_equal
from tests.parity.test_lora import ALL, adapted, expect_curve, expected_curve, lora_run
from tests.parity.test_lora import STEPS as LORA_STEPS
from tests.ranks import run_ranks
from tests.sft.hf.test_exporter import expect_equal, weights
from tests.sft.hf_cases import run_spec, save_hf_model, save_sharded
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity

Stages = tuple[int, int, list[int], dict[str, Any], dict[str, Any]]
STAGES: dict[str, Stages] = {
    # name: (layers, ranks, the split, topology, other settings)
    "3_pp2": (3, 2, [2, 1], {"pipeline_parallel": 2}, {}),
    "3_pp2_given": (3, 2, [1, 2], {"pipeline_parallel": 2, "layers_per_stage": [1, 2]}, {}),
    "3_pp3_packed": (3, 3, [1, 1, 1], {"pipeline_parallel": 3}, {"packing": True}),
    "5_pp4": (5, 4, [1, 1, 2, 1], {"pipeline_parallel": 4}, {}),
    "5_pp4_fused_packed": (5, 4, [1, 1, 2, 1], {"pipeline_parallel": 4}, {"packing": True, "kernels": "fused"}),
    "5_pp2_vpp2": (5, 2, [1, 1, 2, 1], {"pipeline_parallel": 2, "virtual_pipeline": 2}, {}),
    "7_pp3_vpp2_given": (
        7,
        3,
        [2, 1, 1, 1, 1, 1],
        {"pipeline_parallel": 3, "virtual_pipeline": 2, "layers_per_stage": [2, 1, 1, 1, 1, 1]},
        {"packing": True},
    ),
    "3_tp2_pp2_sp": (
        3,
        4,
        [2, 1],
        {"tensor_parallel": 2, "pipeline_parallel": 2, "sequence_parallel": True},
        {"kernels": "fused"},
    ),
    "3_cp2_pp2": (3, 4, [2, 1], {"context_parallel": 2, "pipeline_parallel": 2}, {"packing": True}),
    "3_pp2_dp2_overlap": (3, 4, [2, 1], {"pipeline_parallel": 2}, {"overlap": True}),
    "5_pp2_recomputed": (5, 2, [3, 2], {"pipeline_parallel": 2}, {"recompute": "full"}),
}


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.mark.parametrize(
    "tied", [pytest.param(False, id="untied", marks=pytest.mark.slow), pytest.param(True, id="tied")]
)
@pytest.mark.parametrize("name", thinned(STAGES, "3_pp2"))
def test_gradients_follow_reference(name: str, tied: bool, tmp_path: Path, chat: Path) -> None:
    layers, ranks, split, topology, settings = STAGES[name]
    model = make_tiny_model(tmp_path / "model", layers=layers, tied=tied)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=2, **RATE)
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=2, every=2, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=1e-5)
    for found, gradients in zip(join(by_rank, read_architecture(model)), expected.gradients, strict=True):
        assert_gradients_equal(found, gradients)
    assert TrainerState.read(paths.checkpoint(2)).topology["layers_per_stage"] == split


FAMILIES: dict[str, tuple[str, dict[str, Any], int, dict[str, Any]]] = {
    # name: (case, settings of the model, ranks, topology)
    # Of GLM's five layers the first has no experts: with pp 4 it is alone on its stage.
    "dense_first": ("glm4_moe", {"num_hidden_layers": 5}, 4, {"pipeline_parallel": 4}),
    "dense_first_vpp2": ("glm4_moe", {"num_hidden_layers": 5}, 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "stage_without_experts": (
        "qwen3_moe",
        {"num_hidden_layers": 5, "mlp_only_layers": [0, 1, 2]},
        2,
        {"pipeline_parallel": 2, "layers_per_stage": [3, 2]},
    ),
    "experts_shared": (
        "qwen3_moe",
        {"num_hidden_layers": 5, "mlp_only_layers": [3]},
        4,
        {"pipeline_parallel": 2, "expert_parallel": 2},
    ),
    "windows_gemma2": ("gemma2", {"num_hidden_layers": 5}, 4, {"pipeline_parallel": 4}),
    "windows_gemma3": ("gemma3_text", {"num_hidden_layers": 7}, 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
    "learned_positions": ("gpt2", {"num_hidden_layers": 3}, 2, {"pipeline_parallel": 2}),
    "no_rope_layers": (
        "smollm3",
        {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 1, 1, 0]},
        2,
        {"pipeline_parallel": 2},
    ),
}


@pytest.mark.slow  # what a split does to a layer, Llama shows by default
@pytest.mark.parametrize("name", FAMILIES)
def test_families_follow_reference(name: str, tmp_path: Path, chat: Path) -> None:
    case, more, ranks, topology = FAMILIES[name]
    model = family_model(tmp_path / "model", case, **more)
    expected = reference_curve(tmp_path / "reference", model, chat, steps=2, **RATE)
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=2, packing=True, **RATE)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    assert_gradients_equal(join(by_rank, read_architecture(model))[0], expected.gradients[0])


@pytest.mark.slow  # checkpoints name layers by their numbers in the whole model, which other splits show by default
@pytest.mark.parametrize(
    ("case", "more"),
    [("llama", {}), ("qwen3_moe", {"mlp_only_layers": [0, 1, 2]})],
    ids=["equal_layers", "unequal_layers"],
)
@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        (1, {}),
        (2, {"pipeline_parallel": 2, "layers_per_stage": [1, 4]}),
        (4, {"pipeline_parallel": 4}),
        (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        (4, {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ],
    ids=["pp1", "pp2_1_4", "pp4", "pp2_vpp2", "tp2_pp2"],
)
def test_a_checkpoint_goes_on_under_another_split(
    ranks: int, topology: dict[str, Any], case: str, more: dict[str, Any], tmp_path: Path, chat: Path
) -> None:
    model = family_model(tmp_path / "model", case, num_hidden_layers=5, **more)
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, **RATE}
    first = {"pipeline_parallel": 2, "layers_per_stage": [3, 2]}
    full = make_run(tmp_path / "full", model, chat, ranks=2, topology=first, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", model, chat, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


@pytest.mark.slow
def test_the_same_split_goes_on_bitwise(tmp_path: Path, chat: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=3, tied=True)
    settings: dict[str, Any] = {
        "ranks": 2,
        "topology": {"pipeline_parallel": 2},
    }
    settings |= {"max_steps": 4, "every": 2, "keep_last": 9}
    full = make_run(tmp_path / "full", model, chat, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "again", model, chat, **settings)
    copy_start(full, paths, 2)
    run_training(paths, 2)
    assert curve(paths) == curve(full)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_adapters_of_unequal_stages(ranks: int, tmp_path: Path, chat: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=4, tied=True)
    expected = expected_curve(tmp_path / "reference", model, chat, lambda spec: adapted(model, ALL, spec.train.seed))
    topology = {"pipeline_parallel": ranks, "layers_per_stage": [1, 3] if ranks == 2 else []}
    paths = lora_run(tmp_path, model, chat, ALL, ranks=ranks, topology=topology, max_steps=LORA_STEPS)
    run_training(paths, ranks)
    expect_curve(paths, expected)


@pytest.mark.slow  # as above
@pytest.mark.parametrize(
    ("case", "ranks", "topology"),
    [
        ("llama_tied", 4, {"pipeline_parallel": 4}),
        ("llama", 2, {"pipeline_parallel": 2, "virtual_pipeline": 2}),
        ("glm4_moe", 2, {"pipeline_parallel": 2, "layers_per_stage": [1, 4]}),
        ("gemma3_text", 3, {"pipeline_parallel": 3}),
    ],
)
def test_import_and_export_are_bitwise(case: str, ranks: int, topology: dict[str, Any], tmp_path: Path) -> None:
    model = save_hf_model(case, tmp_path / "model", num_hidden_layers=5)
    run_ranks(ranks, save_sharded, run_spec(model, ranks, **topology), tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", model, tmp_path / "export")
    expect_equal(weights(tmp_path / "export"), weights(model))
