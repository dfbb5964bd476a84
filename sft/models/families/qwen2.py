"""Qwen 2 and 2.5: Llama with a bias on queries, keys and values, and a sliding window in some layers."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    QKV_BIAS,
    SMALL,
    Layer,
    llama_layer,
    rope_of,
    separate_qkv,
    weight_map,
    windows_by_layer,
)
from sft.models.weight_map import ParameterMap


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads")
    activation = config.choice("hidden_act", ACTIVATIONS)
    # attention_bias is not asked for: this family's code has its QKV bias whatever the config says.
    config.refuse_true("mlp_bias")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=activation)
    layers = [
        DecoderLayer(attention=Attention(window=window, qkv_bias=True), mlp=mlp) for window in windows_by_layer(config)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    bias = ParameterMap(blocks=(separate_qkv(shape, f"{prefix}self_attn.", "bias"),))
    return llama_layer(shape, prefix) | {QKV_BIAS: bias}


_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}

FAMILY = Family(
    model_type="qwen2",
    read=_read,
    small_config={**SMALL, "rope_theta": 1000000.0},
    variants={
        "tied": {"tie_word_embeddings": True},
        "yarn": {"rope_parameters": _YARN},
        "windows": {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2},
    },
)
