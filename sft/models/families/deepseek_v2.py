"""DeepSeek-V2, V2-Lite and Coder-V2: latent attention, and experts chosen by a softmax, in groups by their best one."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.latent import SMALL_LATENT, latent_attention, refuse_other_than, with_latents
from sft.models.llama_like import (
    SILU,
    SMALL,
    Layer,
    expert_layers,
    llama_layer,
    rope_of,
    separate_experts,
    shared_expert,
    weight_map,
)
from sft.models.sigmoid_experts import check_groups

_IN_GROUPS = {"greedy": False, "group_limited_greedy": True}
"""By `topk_method`, whether experts are chosen from some groups. Otherwise `n_group` and `topk_group` say nothing."""


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    config.refuse_true("mlp_bias")
    # transformers reads none of these; published code divides the weights of a token's experts by their sum if so told.
    refuse_other_than(config, moe_layer_freq=1, norm_topk_prob=False, rope_interleave=True, scoring_func="softmax")
    experts, attention = _experts(config), latent_attention(config)
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, attention, experts),
        weights=weight_map(shape, with_latents(attention, _expert_part), dense=with_latents(attention, llama_layer)),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _experts(config: ConfigReader) -> Experts:
    shape = config.shape
    if not shape.shared_expert_size:
        config.refuse("n_shared_experts 0 is not supported: layers with experts have a shared one")
    in_groups = config.choice("topk_method", _IN_GROUPS)
    if in_groups:
        config.require("n_group", "topk_group")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=False,
        groups=int(config.number("n_group", 1)) if in_groups else 1,
        chosen_groups=int(config.number("topk_group", 1)) if in_groups else 1,
        best_of_group=1,
        scaling=config.number("routed_scaling_factor", 1.0),
        shared=SharedExpert(width=shape.shared_expert_size, weighted=False),
        activation=config.choice("hidden_act", SILU),
    )
    check_groups(config, experts)
    return experts


def _expert_part(shape: ModelShape, prefix: str) -> Layer:
    mlp = f"{prefix}mlp."
    return {
        **separate_experts(shape, f"{mlp}gate.weight", f"{mlp}experts.{{}}."),
        **shared_expert(shape, f"{mlp}shared_experts."),
    }


FAMILY = Family(
    model_type="deepseek_v2",
    read=_read,
    small_config={
        **SMALL,
        **SMALL_LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.7,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.3,
            "mscale_all_dim": 0.7,
        },
    },
    variants={"lite": {"q_lora_rank": None, "attention_bias": False, "topk_method": "greedy"}},
)
