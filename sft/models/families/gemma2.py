"""Gemma 2: Gemma with norms behind attention and MLP, a window in every other layer, and capped scores and logits."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Activation, Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import SMALL, Layer, llama_layer, rope_of, sliding_layers, weight_map, windows_of
from sft.models.weight_map import vector

GELU_TANH: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh"}


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    config.refuse_true("attention_bias")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_activation", GELU_TANH))
    scale = config.positive("query_pre_attn_scalar", 256.0) ** -0.5
    softcap = config.softcap("attn_logit_softcapping", 50.0)
    layers = [
        DecoderLayer(
            attention=Attention(window=window, softmax_scale=scale, score_softcap=softcap), mlp=mlp, norm_after=True
        )
        for window in alternating_windows(config, interval=2)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, layer_with_four_norms),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
        norm="zero_centered_rms",
        embedding_multiplier=shape.hidden_size**0.5,
        embedding_multiplier_is_rounded=True,
        logits_softcap=config.softcap("final_logit_softcapping", 30.0),
    )


def alternating_windows(config: ConfigReader, *, interval: int) -> list[int | None]:
    """Return each layer's window: by `layer_types`, or else in all but each `interval`-th layer."""
    sliding = sliding_layers(config)
    if sliding is None:
        sliding = [(layer + 1) % interval != 0 for layer in range(config.shape.num_layers)]
    return windows_of(config, sliding, default=4096)


def layer_with_four_norms(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer. Llama's name for the norm before the MLP is here that of the one behind attention."""
    norms = {
        "post_attention_layernorm": "post_attention_layernorm",
        "pre_mlp_layernorm": "pre_feedforward_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    }
    return llama_layer(shape, prefix) | {
        f"{ours}.weight": vector(f"{prefix}{theirs}.weight", shape.hidden_size) for ours, theirs in norms.items()
    }


FAMILY = Family(
    model_type="gemma2",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20,
        "sliding_window": 12,
        "attn_logit_softcapping": 0.7,
        "final_logit_softcapping": 1.5,
    },
    variants={
        "no_caps": {
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
            "tie_word_embeddings": False,
        }
    },
)
