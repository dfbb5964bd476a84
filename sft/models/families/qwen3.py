"""Qwen 3 (dense): Llama with norms on the heads of queries and keys, and a sliding window in some layers."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    SMALL,
    Layer,
    head_norms,
    llama_layer,
    rope_of,
    weight_map,
    windows_by_layer,
)


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    activation = config.choice("hidden_act", ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=activation)
    layers = [
        DecoderLayer(attention=Attention(window=window, qk_norm=True), mlp=mlp) for window in windows_by_layer(config)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    return llama_layer(shape, prefix) | head_norms(shape, prefix)


FAMILY = Family(
    model_type="qwen3",
    read=_read,
    small_config={**SMALL, "head_dim": 16},
    variants={"tied": {"tie_word_embeddings": True}},
)
