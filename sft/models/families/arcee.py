"""Arcee (AFM-4.5B): Llama with an MLP that has no gate and squares what ReLU leaves."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Activation, Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import ACTIVATIONS, FC1, SMALL, Biases, Layer, attention_part, biases_of, rope_of, weight_map
from sft.models.weight_map import vector, whole

_ACTIVATIONS: Mapping[str, Activation] = {"relu2": "relu2", **ACTIVATIONS}


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    biases = biases_of(config)
    activation = config.choice("hidden_act", _ACTIVATIONS)
    layer = DecoderLayer(
        attention=Attention(qkv_bias=biases.attention, output_bias=biases.attention),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, gated=False, bias=biases.mlp),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=weight_map(shape, partial(_layer, biases=biases)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str, *, biases: Biases) -> Layer:
    hidden, width, mlp = shape.hidden_size, shape.ffn_hidden_size, f"{prefix}mlp."
    found = attention_part(shape, prefix, Biases(attention=biases.attention)) | {
        FC1: whole(f"{mlp}up_proj.weight", width, hidden, split=0),
        "mlp.linear_fc2.weight": whole(f"{mlp}down_proj.weight", hidden, width, split=1),
    }
    if biases.mlp:
        found |= {
            "mlp.linear_fc1.bias": whole(f"{mlp}up_proj.bias", width, None, split=0),
            "mlp.linear_fc2.bias": vector(f"{mlp}down_proj.bias", hidden),
        }
    return found


FAMILY = Family(
    model_type="arcee",
    read=_read,
    # transformers' defaults are tokens beyond a small vocabulary
    small_config={**SMALL, "bos_token_id": 1, "eos_token_id": 2},
    variants={"biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "hidden_act": "gelu"}},
)
