"""Gemma 3 without its image tower: Gemma 2's layers with normed query and key heads, and a RoPE for each kind of layer.

Most layers see a window, and rotate as Gemma 2 does; every sixth sees all positions, and rotates more slowly.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.families.gemma2 import GELU_TANH, alternating_windows, layer_with_four_norms
from sft.models.family import Config, Family
from sft.models.llama_like import SMALL, Layer, head_norms, refuse_earlier_type, refuse_untruncated, rope_of, weight_map

_ROPES = ("default", "linear", "llama3", "yarn")
"""Those that do not depend on the length of a batch."""


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    config.refuse_true("attention_bias")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_activation", GELU_TANH))
    scale = config.positive("query_pre_attn_scalar", 256.0) ** -0.5
    everywhere, in_window = (rope_of(config, kinds=_ROPES, values=values) for values in _rope_settings(config))
    layers = [
        DecoderLayer(
            attention=Attention(
                rope=None if window is None else in_window, window=window, qk_norm=True, softmax_scale=scale
            ),
            mlp=mlp,
            norm_after=True,
        )
        for window in alternating_windows(config, interval=config.count("sliding_window_pattern", 6))
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=everywhere,
        norm="zero_centered_rms",
        embedding_multiplier=shape.hidden_size**0.5,
        embedding_multiplier_is_rounded=True,
        logits_softcap=config.softcap("final_logit_softcapping", None),
    )


def _rope_settings(config: ConfigReader) -> tuple[Config, Config]:
    """Return the RoPE settings of layers that see everything, and of those with a window, each as a config of its own.

    Earlier files have two thetas at top level, and a scaling that is for the first kind alone.
    """
    stated, scaling = (config.values.get(key) or {} for key in ("rope_parameters", "rope_scaling"))
    if not isinstance(scaling, dict):
        config.refuse(f"rope_scaling {scaling!r} is not supported; it must hold settings")
        scaling = {}
    refuse_earlier_type(config, scaling)
    if not isinstance(stated, dict) or not stated.keys() <= {"full_attention", "sliding_attention"}:
        config.refuse("rope_parameters must hold settings for full_attention and for sliding_attention")
        stated = {}
    everywhere: dict[str, object] = {**(stated.get("full_attention") or {}), **scaling}
    in_window: dict[str, object] = dict(stated.get("sliding_attention") or {})
    refuse_untruncated(config, full_attention=everywhere, sliding_attention=in_window)
    everywhere.setdefault("rope_theta", config.values.get("rope_theta", 1000000.0))
    in_window.setdefault("rope_theta", config.values.get("rope_local_base_freq", 10000.0))
    return {"rope_parameters": everywhere}, {"rope_parameters": in_window}


def _layer(shape: ModelShape, prefix: str) -> Layer:
    return layer_with_four_norms(shape, prefix) | head_norms(shape, prefix)


FAMILY = Family(
    model_type="gemma3_text",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "tie_word_embeddings": True,
        "query_pre_attn_scalar": 20,
        "sliding_window": 12,
        "sliding_window_pattern": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    variants={"capped": {"final_logit_softcapping": 1.5, "num_key_value_heads": 1, "tie_word_embeddings": False}},
)
