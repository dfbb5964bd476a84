"""Granite 3 (dense): Llama with four multipliers: on embeddings, scores, residual branches and logits."""

from __future__ import annotations

from functools import partial

from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, SMALL, biases_of, llama_layer, rope_of, weight_map


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    activation = config.choice("hidden_act", ACTIVATIONS)
    biases = biases_of(config)
    layer = DecoderLayer(
        # Not a factor beside 1 / sqrt(head_dim) but in its place; 1 where it is left out.
        attention=Attention(
            qkv_bias=biases.attention,
            output_bias=biases.attention,
            softmax_scale=config.positive("attention_multiplier", 1.0),
        ),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, bias=biases.mlp),
        residual_multiplier=config.number("residual_multiplier", 1.0),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(llama_layer, biases=biases)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
        embedding_multiplier=config.number("embedding_multiplier", 1.0),
        logits_scaling=config.positive("logits_scaling", 1.0),
    )


FAMILY = Family(
    model_type="granite",
    read=_read,
    small_config={
        **SMALL,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.21,
        "residual_multiplier": 0.3,
        "logits_scaling": 3.0,
    },
    variants={"tied": {"tie_word_embeddings": True}, "biased": {"attention_bias": True, "mlp_bias": True}},
)
