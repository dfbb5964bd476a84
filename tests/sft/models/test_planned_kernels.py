"""The planner assumes the kernels that the ranks choose, if these have every package."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from launcher.contract.cost_model.assumptions import implementation_of
from launcher.contract.hardware import gpu_kind
from launcher.contract.model_shape import named_model_shape
from launcher.contract.spec import DataSpec, ModelSpec, RunSpec, TrainSpec
from sft.kernels.attention import flash4_takes
from sft.megatron import kernel_choice
from sft.models.architecture import Architecture
from sft.models.registry import read_architecture
from tests.sft.hf_cases import OF_TEXT, save_config

H100 = gpu_kind("h100")
FUSED = TrainSpec(kernels="fused")  # which auto means where Triton is installed
PADDED = RunSpec(data=DataSpec(seq_length=64), train=FUSED)
PACKED = RunSpec(data=DataSpec(seq_length=64, packing=True), train=FUSED)


def planned(spec: RunSpec, architecture: Architecture) -> str:
    return implementation_of(spec, architecture.shape, H100).name


@pytest.mark.parametrize("case", OF_TEXT)
def test_every_family(case: str, tmp_path: Path) -> None:
    architecture = read_architecture(save_config(case, tmp_path))
    assert {layer.norm_before for layer in architecture.layers} == {architecture.shape.norms_first}
    for spec in (PADDED, PACKED):
        kernels = kernel_choice.choose_kernels(spec, architecture, on_gpu=True)
        name = planned(spec, architecture)
        assert (name == "sft-plain-layers") == (kernels.plain_layers_because is not None)
        if kernels.fused_layers and kernels.attention_text != "torch's":
            assert name != "sft-torch-attention"
        elif kernels.fused_layers and architecture.shape.model_type != "gemma2":  # capped scores ask for flash-attn-4
            assert name == "sft-torch-attention"


def test_what_the_config_says() -> None:
    shape = named_model_shape("1b")
    for changed, name in (
        (PACKED, "sft"),
        (PADDED, "sft-torch-attention"),
        (dataclasses.replace(PACKED, train=TrainSpec(attention="flash2")), "sft-flash2"),
        (dataclasses.replace(PACKED, train=TrainSpec(deterministic=True)), "sft-flash2"),
        (dataclasses.replace(PACKED, train=TrainSpec(kernels="plain")), "plain"),
        (dataclasses.replace(PACKED, model=ModelSpec(hidden_dropout=0.1)), "sft-plain-layers"),
    ):
        assert implementation_of(changed, shape, H100).name == name
    assert implementation_of(PACKED, shape, gpu_kind("a100-80gb")).name == "sft-flash2"


def test_heads_of_flash_attention_4() -> None:
    for size in range(16, 264, 8):
        shape = dataclasses.replace(named_model_shape("1b"), head_dim=size)
        assert (implementation_of(PACKED, shape, H100).name == "sft") == flash4_takes(size)
