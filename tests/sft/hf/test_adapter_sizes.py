"""What the planner counts of LoRA is what adapters of each family have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.adapters import active_adapters, expert_adapters, layer_adapters
from launcher.contract.model_shape import ModelShape, read_model_shape
from launcher.contract.spec import LoraSpec
from sft.hf.adapter import adapter_targets
from sft.hf.expert_adapter import expert_targets
from sft.models.architecture import Architecture, Experts
from sft.models.registry import read_architecture
from tests.sft.hf_cases import CASES, save_config

ADAPTABLE = [case for case in CASES if not case.startswith("gpt2")]
SETTINGS = {
    "all": LoraSpec(rank=4),
    "dora": LoraSpec(rank=4, dora=True),
    "some": LoraSpec(rank=3, targets=["q_proj", "o_proj", "qkv_proj", "down_proj", "w1", "experts.down_proj"]),
    "router": LoraSpec(rank=2, router=True),
}


def of_layer(architecture: Architecture, lora: LoraSpec, layer: int) -> int:
    assert lora.rank is not None
    found = 0
    for target in adapter_targets(architecture, lora, layer):
        outputs = sum(target.block_rows)
        found += lora.rank * (target.columns + outputs) + (outputs if lora.dora else 0)
    routed = lora.router and isinstance(architecture.layers[layer].mlp, Experts)
    return found + (architecture.shape.num_experts * architecture.shape.hidden_size if routed else 0)


def of_expert(architecture: Architecture, lora: LoraSpec, layer: int) -> int:
    assert lora.rank is not None
    return sum(lora.rank * (target.columns + target.rows) for target in expert_targets(architecture, lora, layer))


@pytest.mark.parametrize("case", ADAPTABLE)
def test_every_family(case: str, tmp_path: Path) -> None:
    architecture = read_architecture(save_config(case, tmp_path))
    for name, lora in SETTINGS.items():
        expect_same_sizes(architecture, lora, name)


def test_files_with_each_expert_by_itself(tmp_path: Path) -> None:
    """transformers writes Qwen3.5 so, and publishes it with all experts in one tensor: adapters have other names."""
    save_config("qwen3_5_moe_text", tmp_path)
    joined = read_architecture(tmp_path).shape
    index = tmp_path / "model.safetensors.index.json"
    prefix = "model.layers.0.mlp.experts"

    def shape_of(*names: str) -> ModelShape:
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-1.safetensors")}))
        return read_model_shape(tmp_path)

    of_head = "mtp.layers.0.mlp.experts.0.down_proj.weight"  # in a form of its own in published files
    assert shape_of(f"{prefix}.down_proj", of_head) == joined
    separate = shape_of(f"{prefix}.0.down_proj.weight", of_head)
    assert (joined.joined_experts, separate.joined_experts) == (True, False)
    architecture = read_architecture(tmp_path)
    for name, lora in SETTINGS.items():
        expect_same_sizes(architecture, lora, name)
    some = LoraSpec(rank=3, targets=["gate_proj", "up_proj", "down_proj"])
    assert expert_adapters(joined, some) == 0 < expert_adapters(separate, some)


def expect_same_sizes(architecture: Architecture, lora: LoraSpec, name: str) -> None:
    shape = architecture.shape
    active = 0
    for layer in range(shape.num_layers):
        dense = layer in shape.dense_layers
        linear = layer in shape.linear_layers
        own = of_layer(architecture, lora, layer)
        heads = shape.for_layers(windowed=layer in shape.windowed_layers)
        assert layer_adapters(heads, lora, dense=dense, linear=linear) == own, name
        active += own
        if shape.num_experts and not dense:
            of_one = of_expert(architecture, lora, layer)
            assert expert_adapters(shape, lora) == of_one, name
            active += shape.experts_per_token * of_one
    assert active_adapters(shape, lora) == active > 0, name
