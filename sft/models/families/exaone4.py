"""EXAONE 4.0: norms behind attention and MLP alone, normed heads, and in hybrid models windows on rotating layers.

Layers of a hybrid model that see everything do not rotate.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.families.olmo2 import layer_with_norms_behind
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, Layer, head_norms, rope_of, sliding_layers, weight_map, windows_of


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", ACTIVATIONS))
    hybrid = config.values.get("sliding_window", 4096) is not None
    layers = [
        DecoderLayer(
            attention=Attention(rotary=not hybrid or window is not None, window=window, qk_norm=True),
            mlp=mlp,
            norm_before=False,
            norm_after=True,
        )
        for window in windows_of(config, _sliding_layers(config, hybrid=hybrid), default=4096)
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config),
    )


def _sliding_layers(config: ConfigReader, *, hybrid: bool) -> list[bool]:
    """Return which layers have a window: by `layer_types`, or else all but each fourth or so."""
    stated = sliding_layers(config)
    if stated is not None:
        return stated
    if not hybrid:
        config.refuse("sliding_window null without layer_types, by which transformers divides by 0; state both")
        return [False] * config.shape.num_layers
    each = config.count("sliding_window_pattern", 4)
    return [(layer + 1) % each != 0 for layer in range(config.shape.num_layers)]


def _layer(shape: ModelShape, prefix: str) -> Layer:
    return layer_with_norms_behind(shape, prefix) | head_norms(shape, prefix)


FAMILY = Family(
    model_type="exaone4",
    read=_read,
    small_config={**SMALL, "sliding_window": 12, "sliding_window_pattern": 2},
    variants={
        "all_full": {"sliding_window": None, "layer_types": ["full_attention"] * 4, "tie_word_embeddings": True},
        "by_types": {"layer_types": ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]},
    },
)
