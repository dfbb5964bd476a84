"""Adapters of experts: by their definition under every layout of experts, and in PEFT's hands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import LoraSpec
from sft.__main__ import main
from sft.commands.export import export_run
from sft.hf.adapter_export import add_adapter
from sft.hf.expert_adapter import all_expert_targets
from sft.hf.loaded_model import load_transformers_model
from sft.models.registry import read_architecture
from tests.parity.runs import expect_same_end, run_training
from tests.parity.test_families import family_model
from tests.parity.test_lora import STEPS, Curve, adapted, expect_curve, expected_curve, lora_run
from tests.tiers import thinned
from tests.tiny_model import make_chat_rows, write_jsonl

pytestmark = pytest.mark.parity

LORA = LoraSpec(rank=8, alpha=12.0)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "one": (1, {}, {"recompute": "full"}),
    "one_fused": (1, {}, {"kernels": "fused", "packing": True}),
    "ep2": (2, {"expert_parallel": 2}, {"distributed": True}),
    "ep2_packed_fused": (2, {"expert_parallel": 2}, {"packing": True, "kernels": "fused", "recompute": "norms"}),
    "pp2_ep2": (4, {"pipeline_parallel": 2, "expert_parallel": 2}, {}),
    "tp2_sp_ep2": (
        2,
        {"tensor_parallel": 2, "sequence_parallel": True, "expert_parallel": 2, "expert_tensor_parallel": 1},
        {},
    ),
    "ep4": (4, {"expert_parallel": 4}, {}),
}


BY_EXPERT = ["qwen3_moe", "mixtral", "olmoe", "glm4_moe", "qwen3_next", "qwen3_moe_dense_layers", "qwen2_moe"]
BY_EXPERT += ["deepseek_v2", "deepseek_v3", "dots1", "glm4_moe_lite"]
BY_EXPERT += ["ernie4_5_moe", "minimax_m2", "qwen3_5_moe_text"]  # in the form that transformers writes
"""Cases whose files have a tensor for each matrix of each expert."""
WITH_RSLORA = [f"{case} with rsLoRA" for case in ("mixtral", "qwen2_moe", "qwen3_5_moe_text")]
"""One of those whose experts PEFT knows, one of which it knows some, and one of which it knows none."""


class AddedProducts(nn.Module):
    """Weights of all experts plus the products of their adapters, [experts, rows, columns]."""

    def __init__(self, a: list[torch.Tensor], b: list[torch.Tensor], scale: float) -> None:
        super().__init__()
        self.a, self.b = nn.ParameterList(map(nn.Parameter, a)), nn.ParameterList(map(nn.Parameter, b))
        self.scale = scale

    def forward(self, weights: torch.Tensor) -> torch.Tensor:
        return weights + self.scale * torch.cat([b @ a for a, b in zip(self.a, self.b, strict=True)], 1)


def with_expert_adapters(directory: Path, lora: LoraSpec, seed: int) -> Any:
    """transformers' model, in which each matrix of each expert has an adapter, and so has every linear layer."""
    made = adapted(directory, lora, seed)
    by_parameter: dict[str, list[Any]] = {}
    for target in all_expert_targets(read_architecture(directory), lora):
        parameter = "down_proj" if target.linear.endswith("fc2") else "gate_up_proj"
        by_parameter.setdefault(f"model.layers.{target.layer}.mlp.experts {parameter}", []).append(target)
    assert lora.rank is not None
    for place, targets in by_parameter.items():
        module, parameter = place.split()
        experts = range(len(targets[0].modules))
        a = [torch.stack([target.draw_a(expert, lora.rank, seed) for expert in experts]) for target in targets]
        b = [torch.zeros(len(experts), target.rows, lora.rank) for target in targets]
        parametrize.register_parametrization(
            made.get_submodule(module), parameter, AddedProducts(a, b, lora.scale), unsafe=True
        )
    return made


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", make_chat_rows(36, seed=3))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_model(tmp_path_factory.mktemp("model") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, model: Path, chat: Path) -> Curve:
    return expected_curve(
        tmp_path_factory.mktemp("reference"),
        model,
        chat,
        lambda spec: with_expert_adapters(model, LORA, spec.train.seed),
    )


@pytest.mark.parametrize("name", thinned(LAYOUTS, "one", "ep2_packed_fused"))
def test_layout_follows_reference(name: str, tmp_path: Path, model: Path, chat: Path, expected: Curve) -> None:
    ranks, topology, settings = LAYOUTS[name]
    paths = lora_run(tmp_path, model, chat, LORA, ranks=ranks, topology=topology, max_steps=STEPS, **settings)
    run_training(paths, ranks)
    expect_curve(paths, expected)
    assert expected.losses[-1] < expected.losses[0] - 0.1


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # PEFT looks for modules of these names
@pytest.mark.parametrize("name", thinned([*BY_EXPERT, *WITH_RSLORA], "mixtral with rsLoRA", "glm4_moe"))
def test_peft_loads_and_merges_what_is_exported(name: str, tmp_path: Path, chat: Path) -> None:
    """By expert in the files, and in PEFT's hands adapters of the tensors that hold all experts. Shared experts and
    dense layers, whose layers have the same names, keep theirs, which PEFT forgot without a word. With rsLoRA gate and
    up projections were seen to be scaled by a further sqrt(2)."""
    peft = pytest.importorskip("peft")
    case, rslora, _ = name.partition(" with rsLoRA")
    lora = dataclasses.replace(LORA, rslora=bool(rslora))
    model = family_model(tmp_path / "model", case)
    paths = lora_run(
        tmp_path, model, chat, lora, ranks=2, topology={"expert_parallel": 2}, max_steps=2, export_merged=True
    )
    run_training(paths, 2)
    export_run(paths.root)
    adapter = paths.export / "adapter"
    names = set(load_file(adapter / "adapter_model.safetensors"))
    modules = [module for target in all_expert_targets(read_architecture(model), LORA) for module in target.modules]
    assert {f"base_model.model.{module}.lora_B.weight" for module in modules} <= names
    base = load_transformers_model(model, torch.float32)
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().state_dict()
    ours = load_transformers_model(paths.export, torch.float32).state_dict()
    start = load_transformers_model(model, torch.float32).state_dict()
    assert merged.keys() == ours.keys()
    for own, tensor in ours.items():
        torch.testing.assert_close(merged[own], tensor, rtol=1e-5, atol=1e-6)
    added = load_transformers_model(model, torch.float32)
    add_adapter(added, adapter)
    for own, tensor in added.state_dict().items():
        torch.testing.assert_close(tensor, ours[own], rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(ours[own], start[own]) for own in ours if "experts" in own)


def test_a_checkpoint_goes_on_with_other_owners(tmp_path: Path, model: Path, chat: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 4, "every": 2, "keep_last": 9}
    full = lora_run(tmp_path / "full", model, chat, LORA, ranks=2, topology={"expert_parallel": 2}, **settings)
    run_training(full, 2)
    paths = lora_run(tmp_path / "other", model, chat, LORA, ranks=1, **settings)
    expect_same_end(full, paths, 1)


@pytest.mark.parametrize(
    ("lora", "topology", "said"),
    [
        (LORA, {"tensor_parallel": 2}, "set topology.expert_tensor_parallel to 1"),
        (LoraSpec(rank=2, dora=True), {}, "model.lora.dora: adapters of experts (gate_proj, up_proj, down_proj)"),
        (LoraSpec(rank=2, dropout=0.1), {}, "model.lora.dropout 0.1: adapters of experts"),
        (LoraSpec(rank=2, targets=["up_proj"]), {}, "gate_proj and up_proj of experts are one matrix"),
    ],
)
def test_what_adapters_of_experts_cannot_do_is_refused(
    lora: LoraSpec, topology: dict[str, Any], said: str, tmp_path: Path, model: Path, chat: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    paths = lora_run(tmp_path, model, chat, lora, ranks=2, topology=topology)
    assert main(["prepare", str(paths.config)]) == ExitCode.BAD_INPUT
    assert said in capfd.readouterr().err


def test_attention_alone_leaves_experts_as_they_are(tmp_path: Path, model: Path, chat: Path) -> None:
    lora = LoraSpec(rank=2, targets=["q_proj"])
    paths = lora_run(tmp_path, model, chat, lora, ranks=2, topology={"expert_parallel": 2}, max_steps=1)
    run_training(paths, 2)
    export_run(paths.root)
    assert json.loads((paths.export / "adapter_config.json").read_text())["target_modules"] == ["q_proj"]
    assert not [name for name in load_file(paths.export / "adapter_model.safetensors") if "experts" in name]
