"""Phi-3 and Phi-4: Llama with query, key and value in one tensor of the files, and gate and up in another.

The small models rotate a part of each head, and those for long contexts have LongRoPE.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    FC1,
    QKV,
    SMALL,
    Layer,
    joined_gate_and_up,
    joined_qkv,
    llama_layer,
    rope_of,
    weight_map,
    window_of_every_layer,
)
from sft.models.rope import rope_settings
from sft.models.weight_map import ParameterMap


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("rms_norm_eps")
    if rope_settings(config.values)["rope_type"] == "longrope":
        # transformers takes 4096 where it is left out, whatever the RoPE settings say.
        config.require("original_max_position_embeddings")
    activation = config.choice("hidden_act", ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    layer = DecoderLayer(
        attention=Attention(window=window_of_every_layer(config)),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config, partial=True, kinds=("default", "longrope")),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    qkv = joined_qkv(shape, f"{prefix}self_attn.qkv_proj.weight")
    gate_and_up = joined_gate_and_up(shape, f"{prefix}mlp.gate_up_proj.weight")
    return llama_layer(shape, prefix) | {
        QKV: ParameterMap(blocks=(qkv,), columns=shape.hidden_size),
        FC1: ParameterMap(blocks=gate_and_up, columns=shape.hidden_size),
    }


_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.25, 2.5],
    "long_factor": [1.0, 4.0, 16.0],
}

FAMILY = Family(
    model_type="phi3",
    read=_read,
    # transformers' default padding token is 32000, beyond a small vocabulary
    small_config={**SMALL, "sliding_window": None, "pad_token_id": 0},
    variants={
        "partial_rope": {"partial_rotary_factor": 0.75, "sliding_window": 20, "num_key_value_heads": 6},
        "longrope": {
            "partial_rotary_factor": 0.75,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 64,
            "rope_parameters": _LONGROPE,
        },
    },
)
