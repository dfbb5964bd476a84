"""Targets by Hugging Face names, their rows in the fused linears, and the settings PEFT reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from launcher.contract.errors import ModelError
from launcher.contract.spec import LoraSpec
from sft.hf import gguf
from sft.hf.adapter import (
    AdapterTarget,
    AdapterTensors,
    adapter_targets,
    all_targets,
    lora_problems,
    merged_weight,
)
from sft.hf.adapter_export import adapted_model
from sft.hf.expert_adapter import all_expert_targets, expert_target_names
from sft.hf.peft_config import peft_config
from tests.sft.models.test_architecture import write_config
from tests.sft.models.test_weight_map import architecture


def settings(lora: LoraSpec, base: Path = Path("/models/base"), kind: str = "qwen2") -> dict[str, object]:
    model = architecture(kind)
    return peft_config(lora, model, base, all_targets(model, lora), all_expert_targets(model, lora))


def by_name(fused: bool = False, targets: list[str] | None = None) -> dict[str, AdapterTarget]:
    lora = LoraSpec(rank=2, targets=targets or [])
    return {target.name: target for target in adapter_targets(architecture("phi3" if fused else "qwen2"), lora, 1)}


def test_every_linear_layer_is_a_target() -> None:
    found = by_name()
    assert list(found) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [target.linear for target in found.values()] == [
        *["self_attention.linear_qkv"] * 3,
        "self_attention.linear_proj",
        *["mlp.linear_fc1"] * 2,
        "mlp.linear_fc2",
    ]
    assert [name for name, target in found.items() if target.split_input] == ["o_proj", "down_proj"]
    assert [sum(target.block_rows) for target in found.values()] == [24, 12, 12, 8, 12, 12, 8]
    assert found["k_proj"].module == "model.layers.1.self_attn.k_proj"
    assert found["k_proj"].parameter("lora_B.0") == "decoder.layers.1.self_attention.linear_qkv.lora.k_proj.lora_B.0"


def test_chosen_targets() -> None:
    assert list(by_name(targets=["v_proj", "q_proj"])) == ["q_proj", "v_proj"]
    assert len(all_targets(architecture(), LoraSpec(rank=2, targets=["v_proj"]))) == 2


def test_a_fused_tensor_is_one_target() -> None:
    found = by_name(fused=True)
    assert list(found) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert found["qkv_proj"].block_rows == [48]
    assert found["gate_up_proj"].block_rows == [12, 12]


def test_experts_in_one_tensor_are_targets_by_names_of_their_own() -> None:
    """Those of gpt-oss: gate and up projection, whose rows alternate in the files, have one adapter."""
    model = architecture("gpt_oss")
    every = LoraSpec(rank=2)
    assert expert_target_names(model, every) == ["experts.gate_up_proj", "experts.down_proj"]
    up, down = all_expert_targets(model, every)[:2]
    width = up.rows // 2
    assert up.order == (*range(0, 2 * width, 2), *range(1, 2 * width, 2))
    assert (up.tensor, down.rows, down.columns) == ("model.layers.0.mlp.experts.gate_up_proj", up.columns, width)
    assert up.modules[1] == "model.layers.0.mlp.experts.1.gate_up_proj"
    assert up.parameter("lora_A") == "decoder.layers.0.mlp.linear_fc1.lora.gate_up_proj.lora_A"
    lora = LoraSpec(rank=2, targets=["q_proj", "down_proj"])
    assert not all_expert_targets(model, lora)
    assert lora_problems(lora, model, 1, expert_target_names(model, every)) == [
        "model.lora.targets: a gpt_oss model has no linear layer down_proj; it has q_proj, k_proj, v_proj, o_proj, "
        "experts.gate_up_proj, experts.down_proj"
    ]


def test_b_comes_back_in_the_order_of_the_files() -> None:
    """In the linear, query, key and value rows of each KV group are neighbours."""
    target = by_name(fused=True)["qkv_proj"]
    rows = [row for piece in target.parameter_map.pieces for row in range(piece.start, piece.stop)]
    assert rows != sorted(rows)

    class Checkpoint:
        def tensor(self, key: str, index: int | None = None) -> torch.Tensor:
            assert index == 1
            return torch.ones(2, 8) if key.endswith("lora_A") else torch.tensor(rows)[:, None].expand(-1, 2)

    adapter = target.read(Checkpoint())
    assert adapter.b[:, 0].tolist() == list(range(48))
    merged = merged_weight(torch.zeros(48, 8), adapter, 0.5)
    assert torch.equal(merged, torch.arange(48.0)[:, None].expand(-1, 8))


def test_rows_have_the_length_that_dora_gives_them() -> None:
    adapter = AdapterTensors(torch.ones(1, 4), torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 8.0]))
    merged = merged_weight(torch.tensor([[0.0, 0, 0, 0], [2, 2, 2, 2]]), adapter, 1.0)
    assert merged.tolist() == [[1.5] * 4, [4.0] * 4]


def test_first_values_depend_on_name_and_seed_alone() -> None:
    found = by_name()
    first = found["q_proj"].draw_a(4, seed=1)
    assert torch.equal(first, by_name(targets=["q_proj"])["q_proj"].draw_a(4, seed=1))
    assert not torch.equal(first, found["k_proj"].draw_a(4, seed=1))
    assert not torch.equal(first, found["q_proj"].draw_a(4, seed=2))
    assert first.abs().max() <= 8**-0.5


def test_settings_for_peft() -> None:
    config = settings(LoraSpec(rank=4, alpha=8.0, targets=["o_proj"]))
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, ["o_proj"])
    assert (config["base_model_name_or_path"], config["revision"]) == ("/models/base", None)
    assert settings(LoraSpec(rank=4))["lora_alpha"] == 4
    assert (config["use_rslora"], config["use_dora"]) == (False, False)
    both = settings(LoraSpec(rank=4, rslora=True, dora=True))
    assert (both["use_rslora"], both["use_dora"]) == (True, True)


def test_what_peft_makes_of_the_names_of_experts() -> None:
    """Where it takes them for tensors of all experts, it has to be told of shared experts, and else of the tensors."""
    lora = LoraSpec(rank=4, alpha=6.0, targets=["q_proj", "gate_proj", "up_proj", "down_proj"])
    of_next, of_qwen2 = settings(lora, kind="qwen3_next"), settings(lora, kind="qwen2_moe")
    assert of_next["target_modules"] == of_qwen2["target_modules"] == lora.targets
    parameters = of_next["target_parameters"]
    assert isinstance(parameters, list)
    assert parameters[0] == "model.layers.0.mlp.shared_expert.gate_proj.weight"
    assert len(parameters) % 3 == 0
    assert "rank_pattern" not in of_next
    assert of_qwen2["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert (of_qwen2["rank_pattern"], of_qwen2["alpha_pattern"]) == ({"gate_up_proj": 8}, {"gate_up_proj": 12})
    assert "target_parameters" not in settings(lora, kind="llama")


def test_all_linear_is_every_layer() -> None:
    assert list(by_name(targets=["all-linear"])) == list(by_name())


def test_scales() -> None:
    assert LoraSpec(rank=16, alpha=8.0).scale == 0.5
    assert LoraSpec(rank=16, alpha=8.0, rslora=True).scale == 2.0
    assert LoraSpec(rank=16).scale == LoraSpec().scale == 1.0
    assert LoraSpec(rank=16, rslora=True).scale == 4.0


def test_a_gguf_of_a_family_that_is_stored_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(
        gguf, "_write_config", lambda source, directory: write_config(directory, model_type="gemma", head_dim=16)
    )
    with pytest.raises(ModelError, match="GGUF files of gemma models are not converted, only those of llama, "):
        gguf.convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_an_adapter_of_a_model_of_the_hub_names_it_by_id_and_is_found_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    base = tmp_path / "hub" / "models--org--base" / "snapshots" / commit
    config = settings(LoraSpec(rank=4), base)
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", commit)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"is an adapter of org/base .* which is not in the cache"):
        adapted_model(adapter)
    base.mkdir(parents=True)
    assert adapted_model(adapter) == base
