"""Linear attention under every kind of layout, documents that do not meet across ranks, and the forms of files.

What each family does by default stands in the tests that find families by the registry (test_families.py,
test_documents.py, test_generation.py, test_lora.py, test_context_parallel.py). The small models decay slowly
(tests.sft.hf_cases), so that a state that is not reset shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.contract.spec import LoraSpec
from sft.hf.adapter import adapter_targets
from sft.hf.exporter import export_checkpoint
from sft.models.registry import read_architecture
from tests.parity.gradients import join, train_and_capture
from tests.parity.reference import Curve
from tests.parity.runs import curve, expect_same_end, make_run, reference_curve, run_training
from tests.parity.test_context_parallel import gradients_of_second
from tests.parity.test_families import family_model
from tests.parity.test_grid import STEPS, assert_gradients_equal
from tests.parity.test_packing import first_steps
from tests.ranks import run_ranks
from tests.sft.hf.test_exporter import expect_equal, weights
from tests.sft.hf.test_importer import expect_same_logits
from tests.sft.hf_cases import run_spec, save_hf_model, save_sharded
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

FAMILIES = ("qwen3_5_text", "qwen3_next", "qwen3_5_moe_text")
RATE = {"lr": 1e-6}
"""At a larger rate the gradients of the second step differ by how AdamW treats rounding near 0."""
EP2 = {"expert_parallel": 2}
TP2_SP = {"tensor_parallel": 2, "sequence_parallel": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    # name: (ranks, topology, other settings)
    "tp1_padded": (1, {}, {"micro_batch_size": 2}),
    "tp1_fused_packed": (1, {}, {"packing": True, "kernels": "fused"}),
    "tp4_more_ranks_than_kv_heads": (4, {"tensor_parallel": 4}, {"kernels": "fused"}),
    "dp2_packed": (2, {}, {"packing": True, "distributed": True, "overlap": True}),
    "pp2_vpp2_packed": (2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, {"packing": True}),
    "recompute": (2, TP2_SP, {"packing": True, "recompute": "full"}),
    "recompute_norms": (1, {}, {"packing": True, "recompute": "norms", "kernels": "fused"}),
    "recompute_selective": (1, {}, {"packing": True, "micro_batch_size": 2, "recompute": "selective"}),
    "cp2_padded": (2, {"context_parallel": 2}, {"micro_batch_size": 2}),
    "cp2_selective": (2, {"context_parallel": 2}, {"packing": True, "recompute": "selective"}),
    "cp4_packed": (4, {"context_parallel": 4}, {"packing": True}),
    "cp2_pp2_packed": (4, {"context_parallel": 2, "pipeline_parallel": 2}, {"packing": True}),
    "cp2_tp2_sp_fused": (4, {"context_parallel": 2, **TP2_SP}, {"packing": True, "kernels": "fused"}),
}
OF_EXPERTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "ep2_packed": (2, EP2, {"packing": True, "distributed": True, "kernels": "fused"}),
    "ep2_tp2_sp_etp1": (2, {**TP2_SP, **EP2, "expert_tensor_parallel": 1}, {}),
    "ep2_cp2": (2, {"context_parallel": 2, **EP2}, {"packing": True}),
    "ep2_pp2": (4, {"pipeline_parallel": 2, **EP2}, {"packing": True}),
}
DEFAULT = {("qwen3_5_text", "recompute_selective")}
CELLS = [
    pytest.param(family, layout, id=f"{family}-{layout}", marks=() if (family, layout) in DEFAULT else pytest.mark.slow)
    for family in FAMILIES
    for layout in (LAYOUTS if family == "qwen3_5_text" else LAYOUTS | OF_EXPERTS)
]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine examples in steps of eight: the second step has one."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(9, seed=3))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: family_model(root / family, family) for family in FAMILIES}


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Curve]:
    """Filled as they are asked for."""
    return {}


@pytest.mark.parametrize(("family", "layout"), CELLS)
def test_gradients_follow_reference(
    family: str, layout: str, tmp_path: Path, models: dict[str, Path], chat: Path, references: dict[str, Curve]
) -> None:
    ranks, topology, settings = (LAYOUTS | OF_EXPERTS)[layout]
    model = models[family]
    if family not in references:
        references[family] = reference_curve(tmp_path / "reference", model, chat, steps=STEPS, **RATE)
    expected = references[family]
    paths = make_run(tmp_path, model, chat, ranks=ranks, topology=topology, max_steps=STEPS, **RATE, **settings)
    by_rank = run_training(paths, ranks, function=train_and_capture)
    losses, norms = curve(paths)
    assert losses == pytest.approx(expected.losses, rel=1e-5)
    assert norms == pytest.approx(expected.grad_norms, rel=2e-5)
    for found, gradients in zip(join(by_rank, read_architecture(model)), expected.gradients, strict=True):
        assert_gradients_equal(found, gradients)


@pytest.mark.parametrize("context", thinned(["2", "4"], "2"))
def test_no_gradient_reaches_a_neighbour_across_ranks(
    context: str, tmp_path: Path, models: dict[str, Path], chat: Path
) -> None:
    """Exactly 0, and a loss reaches the whole sequence before it. Seen to fail without the reset at documents."""
    model = models["qwen3_5_text"]
    decays = [value.exp() for name, value in load_file(model / "model.safetensors").items() if name.endswith("A_log")]
    assert 0 < float(torch.stack(decays).mean()) < 0.06
    size = int(context)
    topology = {"context_parallel": size}
    by_rank = first_steps(tmp_path, (model, chat), size, topology, gradients_of_second, packing=True)
    for parts in zip(*by_rank, strict=True):
        lengths = parts[0][0]
        gradients = {place: value for _, part in parts for place, value in part.items()}
        second = range(lengths[0], lengths[0] + lengths[1])
        assert sorted(gradients) == list(range(sum(lengths)))
        assert all(gradients[place] > 0 for place in second[:-1])
        assert not any(value for place, value in gradients.items() if place not in second)


@pytest.mark.slow  # by default test_exporter.py reads what two tensor parallel ranks have written
@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(2, {"pipeline_parallel": 2, "virtual_pipeline": 2}, id="pp2_vpp2"),
        pytest.param(2, {"context_parallel": 2}, id="cp2"),
        pytest.param(4, {"tensor_parallel": 4}, id="tp4"),
        pytest.param(1, {}, id="tp1"),
    ],
)
def test_a_checkpoint_goes_on_under_another_topology(
    ranks: int, topology: dict[str, Any], tmp_path: Path, chat: Path, models: dict[str, Path]
) -> None:
    """Projection, convolution and decays are cut by heads, and the optimizer's state follows them."""
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9, "packing": True, **RATE}
    model = models["qwen3_5_text"]
    full = make_run(tmp_path / "full", model, chat, ranks=2, topology={"tensor_parallel": 2}, **settings)
    run_training(full, 2)
    paths = make_run(tmp_path / "other", model, chat, ranks=ranks, topology=topology, **settings)
    expect_same_end(full, paths, ranks)


def as_published(directory: Path) -> Path:
    """Give a model the form of published files: all experts of a layer in two tensors, and a head of further tokens."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for prefix in sorted({name.partition("experts.")[0] for name in tensors if ".experts." in name}):
        parts = {
            which: [tensors.pop(f"{prefix}experts.{number}.{which}_proj.weight") for number in range(8)]
            for which in ("gate", "up", "down")
        }
        pairs = zip(parts["gate"], parts["up"], strict=True)
        tensors[f"{prefix}experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        tensors[f"{prefix}experts.down_proj"] = torch.stack(parts["down"])
    tensors["mtp.layers.0.mlp.experts.0.down_proj.weight"] = torch.randn(48, 24).bfloat16()
    tensors["mtp.norm.weight"] = torch.randn(48)
    save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("case", "ranks", "topology"),
    [
        ("qwen3_5_moe", 2, {"expert_parallel": 2}),
        pytest.param("qwen3_5_moe", 3, {"tensor_parallel": 3}, marks=pytest.mark.slow),
        pytest.param("qwen3_5_moe_text", 2, {"pipeline_parallel": 2}, marks=pytest.mark.slow),
        pytest.param("qwen3_5", 1, {}, marks=pytest.mark.slow),
        pytest.param("qwen3_next", 1, {}, marks=pytest.mark.slow),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, dict) else str(value),
)
def test_published_files_come_out_as_they_were(case: str, ranks: int, topology: dict[str, Any], tmp_path: Path) -> None:
    """Bitwise, in the form that they have, with the vision tower and the head that predicts further tokens."""
    model = save_hf_model(case, tmp_path / "model")
    if case != "qwen3_next":
        as_published(model)
    expect_same_logits(model, ranks, **topology)
    run_ranks(ranks, save_sharded, run_spec(model, ranks, **topology), tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", model, tmp_path / "export")
    expect_equal(weights(tmp_path / "export"), weights(model))


def test_a_text_model_with_the_names_of_its_multimodal_one(tmp_path: Path) -> None:
    """Its modules, by which adapters are found, have those of the text model."""
    model = save_hf_model("qwen3_5_text", tmp_path / "model")
    path = model / "model.safetensors"
    tensors = {name.replace("model.", "model.language_model.", 1): own for name, own in load_file(path).items()}
    save_file(tensors | {"mtp.norm.weight": torch.randn(48)}, path, {"format": "pt"})
    expect_same_logits(model, 1)
    weight_map = read_architecture(model).weights
    (target, *_) = adapter_targets(read_architecture(model), LoraSpec(rank=1), 0)
    assert target.module == "model.language_model.layers.0.linear_attn.in_proj_qkv"
    assert weight_map.module(target.module) == "model.layers.0.linear_attn.in_proj_qkv"
    run_ranks(1, save_sharded, run_spec(model, 1), tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", model, tmp_path / "export")
    expect_equal(weights(tmp_path / "export"), weights(model))
    assert json.loads((tmp_path / "export/config.json").read_text())["model_type"] == "qwen3_5_text"
