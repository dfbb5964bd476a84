"""dots.llm1: Qwen 3's attention, and GLM-4.5's experts behind dense first layers."""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    SMALL,
    Biases,
    Layer,
    LayerMap,
    attention_part,
    expert_layers,
    head_norms,
    llama_layer,
    rope_of,
    sliding_layers,
    weight_map,
)
from sft.models.sigmoid_experts import sigmoid_expert_part, sigmoid_experts


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_shared_experts")
    # transformers' default of norm_topk_prob is false, and the published models have true.
    config.require("moe_intermediate_size", "norm_topk_prob")
    if config.values.get("n_routed_experts") != shape.num_experts:
        config.refuse(f"another number of experts than n_routed_experts is stated, {shape.num_experts}; leave it out")
    _refuse_windows(config)
    experts = sigmoid_experts(config)
    biased = config.flag("attention_bias", default=False)
    attention = Attention(qk_norm=True, qkv_bias=biased, output_bias=biased)
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, attention, experts),
        weights=weight_map(
            shape,
            partial(_layer, mlp=sigmoid_expert_part, biased=biased),
            dense=partial(_layer, mlp=llama_layer, biased=biased),
        ),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _refuse_windows(config: ConfigReader) -> None:
    """Refuse layers with a window, which no published model has."""
    stated = sliding_layers(config)
    first = config.number("max_window_layers", 62)
    by_index = config.values.get("sliding_window", 4096) is not None and first < config.shape.num_layers
    if any(stated) if stated is not None else by_index:
        config.refuse("sliding_window is not supported for model type dots1; set it to null, without sliding layers")


def _layer(shape: ModelShape, prefix: str, *, mlp: LayerMap, biased: bool) -> Layer:
    attention = attention_part(shape, prefix, Biases(attention=biased))
    return mlp(shape, prefix) | attention | head_norms(shape, prefix)


FAMILY = Family(
    model_type="dots1",
    read=_read,
    small_config={
        **SMALL,
        "sliding_window": None,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "n_group": 4,
        "topk_group": 2,
    },
    variants={"biased": {"attention_bias": True, "norm_topk_prob": False, "n_group": 1, "topk_group": 1}},
)
