"""ERNIE 4.5 with experts (21B-A3B, 300B-A47B): experts of most layers, chosen by a bias that is not trained.

Their files may hold one more layer, which predicts a further token. It is not trained; exports have it as it was.
"""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from launcher.contract.usual_keys import ERNIE_KEYS
from sft.models.architecture import Architecture, Attention, Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.families.ernie4_5 import THETA
from sft.models.family import Family
from sft.models.llama_like import (
    SILU,
    SMALL,
    Layer,
    attention_part,
    expert_layers,
    llama_layer,
    rope_of,
    separate_experts,
    shared_expert,
    weight_map,
)
from sft.models.neighbour_pairs import pairs_apart
from sft.models.rope import Rope
from sft.models.weight_map import ParameterMap, Piece


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "moe_num_experts", "moe_k", "moe_intermediate_size")
    config.refuse_true("use_bias")
    config.count("moe_layer_interval", 1)
    _refuse_other_names(config)
    experts = _experts(config)
    if len(shape.dense_layers) == shape.num_layers:
        config.refuse("moe_layer_start_index, moe_layer_end_index and moe_layer_interval leave no layer with experts")
    rope = rope_of(config, default_theta=THETA)
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, Attention(), experts),
        weights=weight_map(
            shape, partial(_layer, rope=rope), dense=partial(_dense_layer, rope=rope), carried=("model.mtp_",)
        ),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope,
    )


def _refuse_other_names(config: ConfigReader) -> None:
    """Refuse a config that states the number of experts twice: transformers takes either name for the same."""
    for other, own in ERNIE_KEYS.items():
        if other in config.values:
            config.refuse(f"{other} is another name of {own} in transformers; state {own} alone")


def _experts(config: ConfigReader) -> Experts:
    shape = config.shape
    return Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=True,
        smallest_sum=config.number("moe_norm_min", 1e-12),
        selection_bias=True,
        shared=SharedExpert(width=shape.shared_expert_size, weighted=False) if shape.shared_expert_size else None,
        activation=config.choice("hidden_act", SILU),
    )


def _layer(shape: ModelShape, prefix: str, *, rope: Rope | None) -> Layer:
    mlp = f"{prefix}mlp."
    # A matrix of one row in the files.
    bias = Piece(f"{mlp}moe_statics.e_score_correction_bias", 0, shape.num_experts, expert=0)
    found = {
        **attention_part(shape, prefix),
        **separate_experts(shape, f"{mlp}gate.weight", f"{mlp}experts.{{}}."),
        "mlp.router.bias": ParameterMap(blocks=((bias,),), split=None, frozen=True),
        **(shared_expert(shape, f"{mlp}shared_experts.") if shape.shared_expert_size else {}),
    }
    return pairs_apart(found, shape, rope)


def _dense_layer(shape: ModelShape, prefix: str, *, rope: Rope | None) -> Layer:
    return pairs_apart(llama_layer(shape, prefix), shape, rope)


FAMILY = Family(
    model_type="ernie4_5_moe",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "rope_theta": THETA,
        "moe_num_experts": 8,
        "moe_k": 3,
        "moe_intermediate_size": 24,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": -1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    },
    variants={
        "none_shared": {
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 2,
            "moe_layer_interval": 2,
            "moe_norm_min": 0.5,
            "tie_word_embeddings": True,
        }
    },
)
