"""Mistral: Llama with a sliding window in every layer."""

from __future__ import annotations

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, llama_layer, rope_of, weight_map, window_of_every_layer


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    # Both have defaults (8 KV heads, a window of 4096) that an old file without them did not mean.
    config.require("num_key_value_heads", "sliding_window")
    activation = config.choice("hidden_act", ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    layer = DecoderLayer(
        attention=Attention(window=window_of_every_layer(config)),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, llama_layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


FAMILY = Family(
    model_type="mistral",
    read=_read,
    small_config={**SMALL, "sliding_window": 24, "rope_theta": 1000000.0},
    variants={"full": {"sliding_window": None}},
)
