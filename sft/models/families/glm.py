"""GLM-4 of 2024 (9B): Llama with half of each head rotated, in neighbouring pairs, and gate and up in one tensor."""

from __future__ import annotations

from dataclasses import replace

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    FC1,
    QKV_BIAS,
    SMALL,
    Layer,
    joined_gate_and_up,
    llama_layer,
    rope_of,
    separate_qkv,
    weight_map,
)
from sft.models.neighbour_pairs import pairs_apart
from sft.models.weight_map import ParameterMap, vector


def read_glm(config: ConfigReader, *, norm_after: bool = False) -> Architecture:
    """Return the architecture, `norm_after` with norms behind attention and MLP, too."""
    shape = config.shape
    config.require("num_key_value_heads", "head_dim", "rms_norm_eps")
    biased = config.flag("attention_bias", default=True)
    config.refuse_true("mlp_bias")
    rope = rope_of(config, partial=True, default_fraction=0.5)
    layer = DecoderLayer(
        attention=Attention(qkv_bias=biased),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", ACTIVATIONS)),
        norm_after=norm_after,
    )

    def maps(shape: ModelShape, prefix: str) -> Layer:
        found = _layer(shape, prefix, biased=biased)
        if norm_after:
            found |= _norms_after(shape, prefix)
        return pairs_apart(found, shape, rope)

    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, maps),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1.5625e-7),
        rope=rope,
    )


def _layer(shape: ModelShape, prefix: str, *, biased: bool) -> Layer:
    gate_and_up = joined_gate_and_up(shape, f"{prefix}mlp.gate_up_proj.weight")
    found = llama_layer(shape, prefix)
    found[FC1] = replace(found[FC1], blocks=gate_and_up)
    if biased:
        found[QKV_BIAS] = ParameterMap(blocks=(separate_qkv(shape, f"{prefix}self_attn.", "bias"),))
    return found


def _norms_after(shape: ModelShape, prefix: str) -> Layer:
    return {
        f"post_{ours}_layernorm.weight": vector(f"{prefix}post_{theirs}_layernorm.weight", shape.hidden_size)
        for ours, theirs in (("attention", "self_attn"), ("mlp", "mlp"))
    }


SMALL_GLM = {
    **SMALL,
    "head_dim": 16,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    # transformers' defaults are tokens beyond a small vocabulary
    "eos_token_id": 2,
    "pad_token_id": 0,
}
"""A tiny model of either family."""

FAMILY = Family(
    model_type="glm",
    read=read_glm,
    small_config=SMALL_GLM,
    variants={"all_rotated": {"partial_rotary_factor": 1.0, "attention_bias": False, "tie_word_embeddings": True}},
)
