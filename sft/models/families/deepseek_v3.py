"""DeepSeek-V3 and R1, and Moonlight: latent attention, and experts behind dense first layers, chosen by sigmoids."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.latent import SMALL_LATENT, latent_attention, refuse_other_than, with_latents
from sft.models.llama_like import SMALL, expert_layers, llama_layer, rope_of, weight_map
from sft.models.sigmoid_experts import further_layers, sigmoid_expert_part, sigmoid_experts


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    config.require("n_group", "topk_group", "routed_scaling_factor", "first_k_dense_replace")
    refuse_other_than(config, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc")
    experts, attention = sigmoid_experts(config), latent_attention(config)
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, attention, experts),
        weights=weight_map(
            shape,
            with_latents(attention, sigmoid_expert_part),
            dense=with_latents(attention, llama_layer),
            carried=further_layers(config),
        ),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


FAMILY = Family(
    model_type="deepseek_v3",
    read=_read,
    small_config={
        **SMALL,
        **SMALL_LATENT,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
            "mscale": 1.3,
            "mscale_all_dim": 0.7,
        },
    },
    variants={
        "no_query_latent": {
            "q_lora_rank": None,
            "rope_interleave": False,
            "attention_bias": False,
            "v_head_dim": 20,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
        }
    },
)
