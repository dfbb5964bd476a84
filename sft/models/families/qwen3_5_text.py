"""The language model of Qwen3.5 and 3.6 by itself: Qwen 3 with linear attention in three of four layers."""

from __future__ import annotations

from sft.models.architecture import Architecture, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.hybrid import SMALL_LINEAR, dense_mlp, hybrid_attention, hybrid_layers, hybrid_rope
from sft.models.llama_like import SILU, SMALL, weight_map_of


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    mlp = DenseMLP(width=shape.ffn_hidden_size, activation=config.choice("hidden_act", SILU))
    return Architecture(
        shape=shape,
        layers=tuple(DecoderLayer(attention=attention, mlp=mlp) for attention in hybrid_attention(config)),
        weights=weight_map_of(
            shape,
            hybrid_layers(shape, [dense_mlp] * shape.num_layers, joined=False),
            carried=("mtp.",),
        ),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=hybrid_rope(config),
        norm="zero_centered_rms",
    )


FAMILY = Family(
    model_type="qwen3_5_text",
    read=_read,
    small_config={
        **SMALL,
        **SMALL_LINEAR,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    variants={
        "tied": {
            "tie_word_embeddings": True,
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": 12,
        }
    },
    nested_names=True,
)
