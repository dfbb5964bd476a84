"""Llama: RMSNorm, RoPE, grouped-query attention and a gated MLP, by some configs with biases or another activation."""

from __future__ import annotations

from functools import partial

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, biases_of, llama_layer, rope_of, weight_map


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    activation = config.choice("hidden_act", ACTIVATIONS)
    biases = biases_of(config)
    layer = DecoderLayer(
        attention=Attention(qkv_bias=biases.attention, output_bias=biases.attention),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, bias=biases.mlp),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(llama_layer, biases=biases)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_OTHER_NUMBERS = {
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 2.0,
    "high_freq_factor": 8.0,
    "original_max_position_embeddings": 256,
}

_YARN_STATED = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "attention_factor": 1.75,
    "truncate": False,
}

FAMILY = Family(
    model_type="llama",
    read=_read,
    small_config={**SMALL, "rope_theta": 500000.0},
    variants={
        "tied": {"tie_word_embeddings": True},
        "mha": {"num_key_value_heads": 6},
        "one_kv_head": {"num_key_value_heads": 1},
        "wide_heads": {"head_dim": 16},
        "llama3_rope": {"rope_parameters": _LLAMA3_ROPE},
        "llama3_rope_other_numbers": {"rope_parameters": {**_LLAMA3_ROPE, **_OTHER_NUMBERS}},
        "linear_rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}},
        "yarn_stated": {"rope_parameters": _YARN_STATED},
        "biased": {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"},
        "biased_attention": {"attention_bias": True, "tie_word_embeddings": True},
        "biased_mlp": {"mlp_bias": True, "hidden_act": "gelu_pytorch_tanh"},
        "dynamic_rope": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    },
)
