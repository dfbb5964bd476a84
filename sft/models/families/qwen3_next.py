"""Qwen3-Next: linear attention in three of four layers, and experts beside a shared one that each token weights."""

from __future__ import annotations

from sft.models.architecture import Architecture, DecoderLayer, DenseMLP, Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.hybrid import SMALL_LINEAR, dense_mlp, hybrid_attention, hybrid_layers, hybrid_rope, weighted_experts
from sft.models.llama_like import SILU, SMALL, weight_map_of


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim", "num_experts_per_tok", "moe_intermediate_size")
    config.require("shared_expert_intermediate_size")
    if not shape.num_experts:
        config.refuse("no num_experts, which a qwen3_next config must state")
    activation = config.choice("hidden_act", SILU)
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=config.flag("norm_topk_prob", default=True),
        shared=SharedExpert(width=shape.shared_expert_size, weighted=True),
        activation=activation,
    )
    dense = DenseMLP(width=shape.ffn_hidden_size, activation=activation)
    layers = [
        DecoderLayer(attention=attention, mlp=dense if layer in shape.dense_layers else experts)
        for layer, attention in enumerate(hybrid_attention(config))
    ]
    maps = [dense_mlp if layer in shape.dense_layers else weighted_experts for layer in range(shape.num_layers)]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map_of(shape, hybrid_layers(shape, maps, joined=True), carried=("mtp.",)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=hybrid_rope(config),
        norm="zero_centered_rms",
    )


FAMILY = Family(
    model_type="qwen3_next",
    read=_read,
    small_config={
        **SMALL,
        **SMALL_LINEAR,
        "partial_rotary_factor": 0.5,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "norm_topk_prob": True,
    },
    variants={"dense_layers": {"mlp_only_layers": [1], "norm_topk_prob": False, "full_attention_interval": 2}},
)
