"""StarCoder2: RoPE and grouped-query attention with GPT-2's norms, its MLP without a gate, and biases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import facts_of
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    ACTIVATIONS,
    FC1,
    SMALL,
    Biases,
    Layer,
    attention_part,
    rope_of,
    weight_map,
    window_of_every_layer,
)
from sft.models.weight_map import FINAL_NORM_BIAS, WeightMap, vector, whole

_, _UP, _DOWN = facts_of("starcoder2").mlp_names
_ACTIVATIONS = {"gelu_pytorch_tanh": ACTIVATIONS["gelu_pytorch_tanh"], **ACTIVATIONS}


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads")
    biased = config.flag("use_bias", default=True)
    activation = config.choice("hidden_act", _ACTIVATIONS)
    layer = DecoderLayer(
        attention=Attention(window=window_of_every_layer(config), qkv_bias=biased, output_bias=biased),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, gated=False, bias=biased),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=_weight_map(shape, biased=biased),
        layernorm_epsilon=config.not_negative("norm_epsilon", 1e-5),
        rope=rope_of(config),
        norm="layer",
    )


def _weight_map(shape: ModelShape, *, biased: bool) -> WeightMap:
    found = weight_map(shape, partial(_layer, biased=biased))
    return replace(found, outer={**found.outer, FINAL_NORM_BIAS: vector("model.norm.bias", shape.hidden_size)})


def _layer(shape: ModelShape, prefix: str, *, biased: bool) -> Layer:
    hidden, width, mlp = shape.hidden_size, shape.ffn_hidden_size, f"{prefix}mlp."
    found = attention_part(shape, prefix, Biases(attention=biased)) | {
        # The norms have biases whatever use_bias says.
        "input_layernorm.bias": vector(f"{prefix}input_layernorm.bias", hidden),
        "pre_mlp_layernorm.bias": vector(f"{prefix}post_attention_layernorm.bias", hidden),
        FC1: whole(f"{mlp}{_UP}.weight", width, hidden, split=0),
        "mlp.linear_fc2.weight": whole(f"{mlp}{_DOWN}.weight", hidden, width, split=1),
    }
    if biased:
        found |= {
            "mlp.linear_fc1.bias": whole(f"{mlp}{_UP}.bias", width, None, split=0),
            "mlp.linear_fc2.bias": vector(f"{mlp}{_DOWN}.bias", hidden),
        }
    return found


FAMILY = Family(
    model_type="starcoder2",
    read=_read,
    small_config={
        **{key: value for key, value in SMALL.items() if key != "rms_norm_eps"},
        "norm_epsilon": 1e-5,
        "sliding_window": 12,
        "tie_word_embeddings": True,
        # transformers' defaults are tokens beyond a small vocabulary
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    variants={"unbiased": {"use_bias": False, "sliding_window": None, "tie_word_embeddings": False}},
)
