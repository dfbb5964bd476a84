"""Olmo 2: Llama with norms behind attention and MLP in place of those before, and with norms over all heads."""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, NO_BIASES, SMALL, Biases, Layer, llama_layer, rope_of, weight_map
from sft.models.weight_map import vector, whole


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    biased = config.flag("attention_bias", default=False)
    config.refuse_true("mlp_bias")
    layer = DecoderLayer(
        attention=Attention(width_norm=True, qkv_bias=biased, output_bias=biased),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", ACTIVATIONS)),
        norm_before=False,
        norm_after=True,
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(olmo_layer, attention_bias=biased)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config),
        norm="late_rounded_rms",
    )


def olmo_layer(shape: ModelShape, prefix: str, *, attention_bias: bool) -> Layer:
    """Return the maps of a layer."""
    biases = Biases(attention=attention_bias)
    return layer_with_norms_behind(shape, prefix, biases) | width_norms(shape, prefix)


def layer_with_norms_behind(shape: ModelShape, prefix: str, biases: Biases = NO_BIASES) -> Layer:
    """Return the maps of a layer of Llama's with norms behind attention and MLP in place of those before."""
    maps = llama_layer(shape, prefix, biases)
    for name in ("input_layernorm.weight", "pre_mlp_layernorm.weight"):
        del maps[name]
    for ours, theirs in (("attention", "attention"), ("mlp", "feedforward")):
        maps[f"post_{ours}_layernorm.weight"] = vector(f"{prefix}post_{theirs}_layernorm.weight", shape.hidden_size)
    return maps


def width_norms(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of the norms over all heads of queries and of keys."""
    heads = {"q": shape.num_attention_heads, "k": shape.num_query_groups}
    return {
        f"self_attention.{which}_layernorm.weight": whole(
            f"{prefix}self_attn.{which}_norm.weight", count * shape.head_dim, None, 0
        )
        for which, count in heads.items()
    }


FAMILY = Family(
    model_type="olmo2",
    read=_read,
    # transformers' defaults are tokens beyond a small vocabulary
    small_config={**SMALL, "eos_token_id": 2, "pad_token_id": 0},
    variants={"biased": {"attention_bias": True, "tie_word_embeddings": True}},
)
