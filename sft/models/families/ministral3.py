"""Ministral 3: Mistral with YaRN, and queries that grow with their positions."""

from __future__ import annotations

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP, QueryScale
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, llama_layer, rope_of, weight_map, window_of_every_layer
from sft.models.rope import rope_settings

_GROWTH = "llama_4_scaling_beta"
_EVERY = "original_max_position_embeddings"


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    # Defaults of transformers that an old file without them need not have meant: 8 KV heads of 128, and the YaRN of one
    # model.
    config.require("num_key_value_heads", "head_dim")
    if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
        config.require("rope_parameters")
    activation = config.choice("hidden_act", ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    layer = DecoderLayer(
        attention=Attention(window=window_of_every_layer(config), query_scale=_query_scale(config)),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, llama_layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config, understood=(_GROWTH,)),
    )


def _query_scale(config: ConfigReader) -> QueryScale | None:
    """Return how queries grow, which stands among the RoPE settings and has no default there."""
    settings = rope_settings(config.values)
    growth, every = settings.get(_GROWTH), settings.get(_EVERY)
    if isinstance(growth, (int, float)) and isinstance(every, int) and every > 0:
        return QueryScale(growth=float(growth), every=every)
    config.refuse(f"rope_parameters must state {_GROWTH} and {_EVERY}; they are {growth} and {every}")
    return None


FAMILY = Family(
    model_type="ministral3",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1000000.0,
            "factor": 16.0,
            # Some of the tests' rows are several times as long.
            "original_max_position_embeddings": 16,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.4,
        },
        # transformers' default padding token is 11, an ordinary one of the tests' vocabulary
        "pad_token_id": 0,
    },
    variants={"tied": {"tie_word_embeddings": True, "sliding_window": 20}},
)
