"""The language model of Qwen3.5 and 3.6 with experts by itself: Qwen3-Next's layers, with experts in all of them.

Published files hold all experts of a layer in two tensors, and those that transformers writes three for each expert.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, DecoderLayer, Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.families import qwen3_5_text
from sft.models.family import Family
from sft.models.hybrid import hybrid_attention, hybrid_layers, hybrid_rope, weighted_experts
from sft.models.llama_like import SILU, Layer, joined_experts, shared_expert, weight_map_of


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim", "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    config.require("shared_expert_intermediate_size")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=True,
        shared=SharedExpert(width=shape.shared_expert_size, weighted=True),
        activation=config.choice("hidden_act", SILU),
    )
    kinds = [_joined if shape.joined_experts else weighted_experts] * shape.num_layers
    return Architecture(
        shape=shape,
        layers=tuple(DecoderLayer(attention=attention, mlp=experts) for attention in hybrid_attention(config)),
        weights=weight_map_of(shape, hybrid_layers(shape, kinds, joined=False), carried=("mtp.",)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=hybrid_rope(config),
        norm="zero_centered_rms",
    )


def _joined(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of experts of which two tensors hold all, and of a shared one that each token weights."""
    mlp = f"{prefix}mlp."
    return {
        **joined_experts(shape, f"{mlp}gate.weight", f"{mlp}experts."),
        **shared_expert(shape, f"{mlp}shared_expert.", weight=f"{mlp}shared_expert_gate.weight"),
    }


FAMILY = Family(
    model_type="qwen3_5_moe_text",
    read=_read,
    small_config={
        **{key: value for key, value in qwen3_5_text.FAMILY.small_config.items() if key != "intermediate_size"},
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
    },
    nested_names=True,
)
