"""ERNIE 4.5 (0.3B): Llama whose heads rotate in neighbouring pairs, by some configs with a bias in every linear."""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, Biases, Layer, llama_layer, rope_of, weight_map
from sft.models.neighbour_pairs import pairs_apart
from sft.models.rope import Rope

THETA = 500000.0


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    biased = config.flag("use_bias", default=False)
    rope = rope_of(config, default_theta=THETA)
    activation = config.choice("hidden_act", ACTIVATIONS)
    layer = DecoderLayer(
        attention=Attention(qkv_bias=biased, output_bias=biased),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, bias=biased),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(_layer, rope=rope, biased=biased)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope,
    )


def _layer(shape: ModelShape, prefix: str, *, rope: Rope | None, biased: bool) -> Layer:
    return pairs_apart(llama_layer(shape, prefix, Biases(attention=biased, mlp=biased)), shape, rope)


FAMILY = Family(
    model_type="ernie4_5",
    read=_read,
    small_config={**SMALL, "head_dim": 16, "rope_theta": THETA, "tie_word_embeddings": True},
    variants={"biased": {"use_bias": True, "tie_word_embeddings": False, "hidden_act": "gelu"}},
)
