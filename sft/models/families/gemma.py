"""Gemma: Llama with a GELU gate, norms that multiply by 1 + weight, and embeddings times sqrt(hidden size)."""

from __future__ import annotations

from sft.models.architecture import Activation, Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import SMALL, llama_layer, rope_of, weight_map

# Gemma's first files say "gelu" and mean its tanh form; transformers reads them so too.
_ACTIVATIONS: dict[str, Activation] = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu_tanh"}


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim")
    activation = config.choice("hidden_act", _ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    layer = DecoderLayer(attention=Attention(), mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation))
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, llama_layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
        norm="zero_centered_rms",
        embedding_multiplier=shape.hidden_size**0.5,
        embedding_multiplier_is_rounded=True,
    )


FAMILY = Family(
    model_type="gemma",
    read=_read,
    small_config={**SMALL, "head_dim": 16, "tie_word_embeddings": True},
    variants={"untied": {"num_key_value_heads": 1, "tie_word_embeddings": False}},
)
