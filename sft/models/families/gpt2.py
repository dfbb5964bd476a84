"""GPT-2: LayerNorm, learned positions, an MLP without a gate, and a bias in each linear layer.

The files hold matrices as [input, output], and query, key and value in one tensor.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from launcher.contract.usual_keys import GPT2_KEYS
from sft.models.architecture import Activation, Architecture, Attention, DecoderLayer, DenseMLP
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import FC1, QKV, QKV_BIAS, Layer, joined_qkv
from sft.models.weight_map import (
    EMBEDDING,
    FINAL_NORM,
    FINAL_NORM_BIAS,
    OUTPUT,
    POSITIONS,
    ParameterMap,
    WeightMap,
    vector,
    vocabulary,
    whole,
)

_ACTIVATIONS: dict[str, Activation] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    if "max_position_embeddings" not in config.values:
        config.require("n_positions")  # rows of a table, for which there is no default that fits all files
    _refuse_two_sizes(config)
    activation = config.choice("activation_function", _ACTIVATIONS)
    config.refuse_true("attention_bias", "mlp_bias")
    layer = DecoderLayer(
        attention=Attention(rotary=False, qkv_bias=True, output_bias=True),
        mlp=DenseMLP(width=shape.ffn_hidden_size, activation=activation, gated=False, bias=True),
    )
    return Architecture(
        shape=shape,
        layers=(layer,) * shape.num_layers,
        weights=_weight_map(shape),
        layernorm_epsilon=config.not_negative("layer_norm_epsilon", 1e-5),
        rope=None,
        norm="layer",
    )


def _refuse_two_sizes(config: ConfigReader) -> None:
    """Refuse a size that is stated by both of its names with two values. The number of heads shows in no weight."""
    names = {ours: theirs for ours, theirs in GPT2_KEYS.items() if theirs != "n_inner"}  # transformers knows it alone
    for ours, theirs in names.items():
        values = [config.values.get(key) for key in (theirs, ours)]
        if None not in values and values[0] != values[1]:
            config.refuse(f"{theirs} {values[0]} and {ours} {values[1]} mean the same, and differ")


def _weight_map(shape: ModelShape) -> WeightMap:
    hidden, embedding = shape.hidden_size, "transformer.wte.weight"
    head = embedding if shape.tied_embeddings else "lm_head.weight"
    return WeightMap(
        outer={
            EMBEDDING: vocabulary(embedding, shape.vocab_size, hidden),
            POSITIONS: whole("transformer.wpe.weight", shape.max_position_embeddings, hidden, None),
            FINAL_NORM: vector("transformer.ln_f.weight", hidden),
            FINAL_NORM_BIAS: vector("transformer.ln_f.bias", hidden),
            OUTPUT: vocabulary(head, shape.vocab_size, hidden),
        },
        layers=tuple(_layer(shape, f"transformer.h.{index}.") for index in range(shape.num_layers)),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    hidden, ffn = shape.hidden_size, shape.ffn_hidden_size
    weight, bias = (joined_qkv(shape, f"{prefix}attn.c_attn.{kind}") for kind in ("weight", "bias"))
    attention, mlp = "self_attention.linear_", "mlp.linear_"
    layer = {
        QKV: ParameterMap(blocks=(weight,), columns=hidden, transposed=True),
        QKV_BIAS: ParameterMap(blocks=(bias,)),
        f"{attention}proj.weight": whole(f"{prefix}attn.c_proj.weight", hidden, hidden, 1, transposed=True),
        f"{attention}proj.bias": vector(f"{prefix}attn.c_proj.bias", hidden),
        FC1: whole(f"{prefix}mlp.c_fc.weight", ffn, hidden, 0, transposed=True),
        f"{mlp}fc1.bias": whole(f"{prefix}mlp.c_fc.bias", ffn, None, 0),
        f"{mlp}fc2.weight": whole(f"{prefix}mlp.c_proj.weight", hidden, ffn, 1, transposed=True),
        f"{mlp}fc2.bias": vector(f"{prefix}mlp.c_proj.bias", hidden),
    }
    for ours, theirs in (("input_layernorm", "ln_1"), ("pre_mlp_layernorm", "ln_2")):
        for kind in ("weight", "bias"):
            layer[f"{ours}.{kind}"] = vector(f"{prefix}{theirs}.{kind}", hidden)
    return layer


FAMILY = Family(
    model_type="gpt2",
    read=_read,
    small_config={
        "hidden_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "n_inner": 72,
        # transformers' default is a dropout of a tenth
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    base_prefix="transformer.",
    variants={"untied": {"activation_function": "gelu", "tie_word_embeddings": False}},
)
