"""Seed-OSS (36B): Llama with a bias on queries, keys and values, and by some configs on the output and in the MLP."""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    OUTPUT_BIAS,
    QKV_BIAS,
    SMALL,
    Biases,
    Layer,
    llama_layer,
    rope_of,
    separate_qkv,
    weight_map,
)
from sft.models.weight_map import ParameterMap, vector


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    attention = Attention(
        qkv_bias=config.flag("attention_bias", default=True),
        output_bias=config.flag("attention_out_bias", default=False),
    )
    mlp = DenseMLP(
        width=shape.ffn_hidden_size,
        activation=config.choice("hidden_act", ACTIVATIONS),
        bias=config.flag("mlp_bias", default=False),
    )
    return Architecture(
        shape=shape,
        layers=(DecoderLayer(attention=attention, mlp=mlp),) * shape.num_layers,
        weights=weight_map(shape, partial(_layer, attention=attention, mlp=mlp)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str, *, attention: Attention, mlp: DenseMLP) -> Layer:
    found = llama_layer(shape, prefix, Biases(mlp=mlp.bias))
    if attention.qkv_bias:
        found[QKV_BIAS] = ParameterMap(blocks=(separate_qkv(shape, f"{prefix}self_attn.", "bias"),))
    if attention.output_bias:
        found[OUTPUT_BIAS] = vector(f"{prefix}self_attn.o_proj.bias", shape.hidden_size)
    return found


FAMILY = Family(
    model_type="seed_oss",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "attention_bias": True,
        "attention_out_bias": False,
        # which are a tenth where they are left out
        "attention_dropout": 0.0,
        "residual_dropout": 0.0,
    },
    variants={"other_biases": {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}},
)
