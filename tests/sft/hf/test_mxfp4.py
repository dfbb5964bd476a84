"""gpt-oss as it is published: experts in MXFP4 come in as transformers dequantises them, and bf16 goes out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launcher.contract.errors import ModelError
from launcher.contract.spec import LoraSpec
from sft.commands.export import export_run
from sft.hf.exporter import export_checkpoint
from sft.hf.files import check_model_files
from sft.hf.loaded_model import load_transformers_model
from sft.hf.mxfp4 import dequantized
from sft.models.registry import read_architecture
from tests.parity.runs import run_training
from tests.parity.test_families import family_model
from tests.parity.test_lora import lora_run
from tests.ranks import run_ranks
from tests.sft.hf.test_exporter import weights
from tests.sft.hf_cases import example_ids, hf_logits, rank_logits, run_spec, save_hf_model, save_sharded
from tests.tiny_model import make_chat_rows, write_jsonl

QUANTIZED = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "num_local_experts": 4,
}
"""Square matrices, as the published models have them, whose transposes fit as well."""


def draw_mxfp4(experts: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks of any bits, with scales that make numbers of about 0.1."""
    groups = (experts, outputs, inputs // 32)
    blocks = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
    return blocks, torch.randint(120, 125, groups, dtype=torch.uint8)


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A tiny model in the form of the published files."""
    return quantized(save_hf_model("gpt_oss", tmp_path / "published", dtype=torch.bfloat16, **SIZES))


def quantized(directory: Path) -> Path:
    """Put drawn blocks and scales in place of the experts' matrices, and say so in the config."""
    tensors = load_file(directory / "model.safetensors")
    for layer in range(2):
        for name, (outputs, inputs) in {"gate_up_proj": (128, 64), "down_proj": (64, 64)}.items():
            place = f"model.layers.{layer}.mlp.experts.{name}"
            del tensors[place]
            tensors[f"{place}_blocks"], tensors[f"{place}_scales"] = draw_mxfp4(4, outputs, inputs)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    change_config(directory, lambda config: config | {"quantization_config": QUANTIZED})
    return directory


def change_config(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


def test_every_byte_under_every_scale_is_transformers_number() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 255, 16, 16).contiguous()
    scales = torch.arange(255, dtype=torch.uint8).view(1, 255, 1).expand(1, 255, 16).contiguous()
    found = dequantized(blocks, scales).transpose(1, 2)
    expected = convert_moe_packed_tensors(blocks, scales)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(found, expected)
    assert torch.equal(found.signbit(), expected.signbit())


@pytest.mark.parity
@pytest.mark.parametrize(
    ("ranks", "topology"),
    [
        pytest.param(1, {}, id="one"),
        pytest.param(2, {"tensor_parallel": 2}, id="tp2"),
        pytest.param(2, {"expert_parallel": 2}, id="ep2", marks=pytest.mark.slow),
    ],
)
def test_logits_and_export_are_those_of_transformers(
    ranks: int, topology: dict[str, int], published: Path, tmp_path: Path
) -> None:
    """What transformers loads of the published form, it finds in the export as bf16, number for number."""
    check_model_files(published, read_architecture(published))
    spec, ids = run_spec(published, ranks, **topology), example_ids()
    found = torch.from_numpy(run_ranks(ranks, rank_logits, spec, ids.tolist(), init=True)[-1])
    expected = hf_logits(published, ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()

    run_ranks(ranks, save_sharded, spec, tmp_path / "sharded", init=True)
    export_checkpoint(tmp_path / "sharded", published, tmp_path / "export")
    loaded = load_transformers_model(published, torch.bfloat16).state_dict()
    tensors = weights(tmp_path / "export")
    assert tensors.keys() == loaded.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, loaded[name].to(torch.bfloat16)), name
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "bfloat16"
    _, report = load_transformers_model(tmp_path / "export", torch.float32, output_loading_info=True)  # type: ignore[misc]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


@pytest.mark.parity
def test_adapters_over_published_files_are_merged_into_bf16(tmp_path: Path) -> None:
    """Attention alone is adapted; the experts of the merged model are those of the source, dequantized."""
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(12, seed=3))
    directory = quantized(family_model(tmp_path / "model", "gpt_oss", **SIZES))
    lora = LoraSpec(rank=2, targets=["q_proj", "k_proj", "v_proj", "o_proj"])
    paths = lora_run(tmp_path, directory, chat, lora, ranks=1, max_steps=2, export_merged=True, precision="bf16")
    run_training(paths, 1)
    export_run(paths.root)
    found = weights(paths.export)
    loaded = load_transformers_model(directory, torch.float32).state_dict()
    assert found.keys() == loaded.keys()
    changed = {name for name, tensor in found.items() if not torch.equal(tensor.float(), loaded[name].float())}
    assert changed == {f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(2) for name in "qkvo"}
    assert {tensor.dtype for name, tensor in found.items() if ".experts." in name and "bias" not in name} == {
        torch.bfloat16
    }
    assert "quantization_config" not in json.loads((paths.export / "config.json").read_text())


def test_files_that_are_not_what_the_config_says_are_refused(published: Path, tmp_path: Path) -> None:
    plain = save_hf_model("gpt_oss", tmp_path / "plain", **SIZES)
    change_config(plain, lambda config: config | {"quantization_config": QUANTIZED})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.experts\.gate_up_proj_blocks"):
        check_model_files(plain, read_architecture(plain))
    change_config(published, lambda config: {key: config[key] for key in config if key != "quantization_config"})
    with pytest.raises(ModelError, match=r"no tensor model\.layers\.0\.mlp\.experts\.gate_up_proj in any"):
        check_model_files(published, read_architecture(published))


def test_blocks_of_another_type_are_refused(published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    save_file(tensors | {name: tensors[name].float()}, published / "model.safetensors")
    with pytest.raises(ModelError, match=f"tensor {name} is F32; supported are U8"):
        check_model_files(published, read_architecture(published))


def test_other_quantizations_are_refused(published: Path) -> None:
    change_config(published, lambda config: config | {"quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ModelError, match="quantized weights are not supported"):
        read_architecture(published)
    change_config(
        published, lambda config: config | {"quantization_config": QUANTIZED, "intermediate_size": 72, "head_dim": 16}
    )
    with pytest.raises(ModelError, match="intermediate_size 72 must be multiples of 32"):
        read_architecture(published)


@pytest.mark.parity
def test_a_scale_that_is_no_number_is_refused(published: Path) -> None:
    tensors = load_file(published / "model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj_scales"
    tensors[name][2, 3, 1] = 255
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(Exception, match=f"{name} has a scale that is not a number"):
        run_ranks(1, rank_logits, run_spec(published, 1), example_ids().tolist(), init=True)
