"""Qwen 3 with experts (30B-A3B, 235B-A22B, Coder): Qwen 3's attention, and experts in place of most or all MLPs."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, Experts
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    SILU,
    SMALL,
    Layer,
    attention_part,
    expert_layers,
    head_norms,
    llama_layer,
    rope_of,
    separate_experts,
    weight_map,
    window_of_every_layer,
)


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    # transformers' default of norm_topk_prob is false, and the published models have true.
    config.require("num_key_value_heads", "head_dim", "num_experts_per_tok", "norm_topk_prob", "moe_intermediate_size")
    if not shape.num_experts:
        config.refuse(
            "no num_experts (transformers 5 also writes num_local_experts), which a qwen3_moe config must state"
        )
    activation = config.choice("hidden_act", SILU)
    config.refuse_true("attention_bias", "mlp_bias")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=config.flag("norm_topk_prob", default=False),
        activation=activation,
    )
    # Unlike Qwen 3's: of all layers, whatever max_window_layers and layer_types say.
    window = window_of_every_layer(config) if config.flag("use_sliding_window", default=False) else None
    attention = Attention(window=window, qk_norm=True)
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, attention, experts),
        weights=weight_map(shape, _layer, dense=_dense_layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    experts = separate_experts(shape, f"{prefix}mlp.gate.weight", f"{prefix}mlp.experts.{{}}.")
    return attention_part(shape, prefix) | head_norms(shape, prefix) | experts


def _dense_layer(shape: ModelShape, prefix: str) -> Layer:
    return llama_layer(shape, prefix) | head_norms(shape, prefix)


FAMILY = Family(
    model_type="qwen3_moe",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    variants={
        "tied": {"tie_word_embeddings": True},
        "unnormalized": {"norm_topk_prob": False},
        "dense_layers": {"mlp_only_layers": [3], "decoder_sparse_step": 2},
        "window": {"use_sliding_window": True, "sliding_window": 20},
    },
)
