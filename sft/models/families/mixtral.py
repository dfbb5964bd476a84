"""Mixtral: Mistral's attention, and experts in place of every MLP."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import MIXTRAL_NAMES
from sft.models.architecture import Architecture, Attention, DecoderLayer, Experts
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    SILU,
    SMALL,
    Layer,
    attention_part,
    rope_of,
    separate_experts,
    weight_map,
    window_of_every_layer,
)


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "num_local_experts", "num_experts_per_tok")
    activation = config.choice("hidden_act", SILU)
    if config.number("router_jitter_noise", 0.0) != 0:
        config.refuse("router_jitter_noise is not supported: a token's experts must not be random; set it to 0")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.ffn_hidden_size,
        normalized=True,
        activation=activation,
    )
    layer = DecoderLayer(attention=Attention(window=window_of_every_layer(config)), mlp=experts)
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config, default_theta=1000000.0),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    block = f"{prefix}block_sparse_moe."
    experts = separate_experts(shape, f"{block}gate.weight", f"{block}experts.{{}}.", MIXTRAL_NAMES)
    return attention_part(shape, prefix) | experts


FAMILY = Family(
    model_type="mixtral",
    read=_read,
    small_config={**SMALL, "num_local_experts": 6, "num_experts_per_tok": 2},
    variants={"window": {"sliding_window": 20}},
)
