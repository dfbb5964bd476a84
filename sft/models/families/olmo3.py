"""Olmo 3: Olmo 2 with a window in three of four layers, and a scaled RoPE in the others alone."""

from __future__ import annotations

from functools import partial

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.families.gemma2 import alternating_windows
from sft.models.families.olmo2 import olmo_layer
from sft.models.family import Config, Family
from sft.models.llama_like import ACTIVATIONS, SMALL, refuse_earlier_type, refuse_untruncated, rope_of, weight_map

_THETA = 500000.0


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    biased = config.flag("attention_bias", default=False)
    config.refuse_true("mlp_bias")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", ACTIVATIONS))
    everywhere, in_window = (rope_of(config, values=settings) for settings in _rope_settings(config))
    layers = [
        DecoderLayer(
            attention=Attention(
                rope=None if window is None else in_window,
                window=window,
                width_norm=True,
                qkv_bias=biased,
                output_bias=biased,
            ),
            mlp=mlp,
            norm_before=False,
            norm_after=True,
        )
        for window in alternating_windows(config, interval=4)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, partial(olmo_layer, attention_bias=biased)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=everywhere,
        norm="late_rounded_rms",
    )


def _rope_settings(config: ConfigReader) -> tuple[Config, Config]:
    """Return the RoPE settings of layers that see everything, and of those with a window, each as a config of its own.

    What earlier files have at top level is for the first kind alone; even their theta, in transformers' code.
    """
    stated = config.values.get("rope_parameters") or {}
    kinds = ("full_attention", "sliding_attention")
    if not isinstance(stated, dict) or not stated.keys() <= set(kinds):
        config.refuse("rope_parameters must hold settings for full_attention and for sliding_attention")
        stated = {}
    everywhere, in_window = (dict(stated.get(kind) or {}) for kind in kinds)
    scaling = config.values.get("rope_scaling")
    if isinstance(scaling, dict):
        refuse_earlier_type(config, scaling)
        everywhere |= scaling
    everywhere.setdefault("rope_theta", config.values.get("rope_theta", _THETA))
    in_window.setdefault("rope_theta", _THETA)
    refuse_untruncated(config, full_attention=everywhere, sliding_attention=in_window)
    return {"rope_parameters": everywhere}, {"rope_parameters": in_window}


FAMILY = Family(
    model_type="olmo3",
    read=_read,
    small_config={
        **SMALL,
        "sliding_window": 12,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "yarn",
                "rope_theta": _THETA,
                "factor": 8.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": _THETA},
        },
        # transformers' defaults are tokens beyond a small vocabulary
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={
        "biased": {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        }
    },
)
