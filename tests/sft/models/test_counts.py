"""Weights and operations that plans and MFU count, compared with transformers' own models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from launcher.contract.flops import core_width, head_operations, layer_matmul_parameters, parameters
from launcher.contract.model_shape import ModelShape
from sft.models.registry import read_architecture
from tests.sft.hf_cases import OF_TEXT, VOCAB_SIZE, auto_class, hf_config, save_config
from tests.sft.models.test_published import CONFIGS

TOKENS = 32


def counted_operations(case: str) -> dict[str, int]:
    """The operations of transformers' forward pass over one row, by kind of product."""
    model = auto_class(case).from_config(hf_config(case), attn_implementation="eager", experts_implementation="eager")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model.eval()(input_ids=torch.arange(TOKENS).unsqueeze(0) % VOCAB_SIZE)
    return {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}


def of_layer(shape: ModelShape, layer: int) -> ModelShape:
    """The shape with the heads of one layer."""
    return shape.for_layers(windowed=layer in shape.windowed_layers)


def of_products(shape: ModelShape) -> int:
    """What is counted for the linear layers: two operations for each weight and token."""
    dense, linear = shape.dense_layers, shape.linear_layers
    weights = sum(
        layer_matmul_parameters(
            of_layer(shape, layer), active=layer not in dense, dense=layer in dense, linear=layer in linear
        )
        for layer in range(shape.num_layers)
    )
    return TOKENS * (2 * weights + head_operations(shape) // 3)


@pytest.mark.parametrize("case", OF_TEXT)
def test_operations_of_every_family(case: str, tmp_path: Path) -> None:
    """Those of linear layers, experts and output layer, and of attention without its mask, which halves it here."""
    shape = read_architecture(save_config(case, tmp_path)).shape
    counted = counted_operations(case)
    assert counted["aten.mm"] + counted.get("aten.addmm", 0) == of_products(shape)
    if shape.linear is None:  # the rule of linear attention is made of the same products
        widths = sum(core_width(of_layer(shape, layer)) for layer in range(shape.num_layers))
        assert counted["aten.bmm"] == 2 * TOKENS**2 * widths


@pytest.mark.parametrize("name", CONFIGS)
def test_weights_of_published_configs(name: str, tmp_path: Path) -> None:
    """All of transformers' model, without biases and sinks; of a multimodal one those of its language model."""
    from transformers import AutoConfig, AutoModelForCausalLM

    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[name]))
    shape = read_architecture(tmp_path).shape
    config = AutoConfig.from_pretrained(tmp_path).get_text_config()
    config.tie_word_embeddings = shape.tied_embeddings  # which a multimodal config says outside of its text model's
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(
        parameter.numel() for key, parameter in model.named_parameters() if not key.endswith(("bias", "sinks"))
    )
    assert parameters(shape) == counted
