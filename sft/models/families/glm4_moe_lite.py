"""GLM-4.7-Flash: latent attention, and the experts of GLM-4.5."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.latent import SMALL_LATENT, latent_attention, with_latents
from sft.models.llama_like import SMALL, expert_layers, llama_layer, rope_of, weight_map
from sft.models.sigmoid_experts import further_layers, sigmoid_expert_part, sigmoid_experts

_DENSE, _SPARSE = "dense", "sparse"


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")
    config.require("routed_scaling_factor")
    _check_dense_layers(config)
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
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config),
    )


def _check_dense_layers(config: ConfigReader) -> None:
    """Refuse kinds of layers that are none, and what published files say beside them if it says something else.

    transformers reads `mlp_layer_types` alone: without it the first layer is dense.
    """
    kinds = config.list_by_layer("mlp_layer_types") or []
    for kind in sorted({str(kind) for kind in kinds} - {_DENSE, _SPARSE}):
        config.refuse(f"mlp_layer_types has {kind!r}; only {_DENSE} and {_SPARSE} are supported")
    dense, first = config.shape.dense_layers, config.values.get("first_k_dense_replace")
    if first is not None and not (isinstance(first, int) and tuple(range(first)) == dense):
        config.refuse(
            f"first_k_dense_replace {first}: transformers reads mlp_layer_types alone in this family, by which dense "
            f"layers are {', '.join(map(str, dense)) or 'none'}; leave it out, or let both say the same"
        )


FAMILY = Family(
    model_type="glm4_moe_lite",
    read=_read,
    small_config={
        **SMALL,
        **SMALL_LATENT,
        "qk_nope_head_dim": 16,
        "v_head_dim": 24,  # queries and values of one size, as those of the published model
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 24,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.7,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
    },
    variants={
        "alternating": {
            "mlp_layer_types": [_SPARSE, _DENSE, _SPARSE, _DENSE],
            "q_lora_rank": None,
            "attention_bias": False,
            "n_group": 1,
            "topk_group": 1,
        }
    },
)
