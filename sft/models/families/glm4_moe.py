"""GLM-4.5, 4.5-Air and 4.6: experts behind dense first layers, chosen by sigmoids and a bias that is not trained.

Their files hold one more layer, which predicts a further token. It is not trained; exports have it as it was.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    QKV_BIAS,
    SMALL,
    Layer,
    LayerMap,
    attention_part,
    expert_layers,
    head_norms,
    llama_layer,
    rope_of,
    separate_qkv,
    weight_map,
)
from sft.models.sigmoid_experts import further_layers, sigmoid_expert_part, sigmoid_experts
from sft.models.weight_map import ParameterMap


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok")
    config.require("moe_intermediate_size", "n_shared_experts", "first_k_dense_replace")
    experts = sigmoid_experts(config)
    attention = Attention(
        qkv_bias=config.flag("attention_bias", default=False), qk_norm=config.flag("use_qk_norm", default=False)
    )
    return Architecture(
        shape=shape,
        layers=expert_layers(shape, attention, experts),
        weights=weight_map(
            shape,
            _with_attention(attention, sigmoid_expert_part),
            dense=_with_attention(attention, llama_layer),
            carried=further_layers(config),
        ),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config, partial=True, default_fraction=0.5),
    )


def _with_attention(attention: Attention, mlp: LayerMap) -> LayerMap:
    """Return what maps a layer with this attention and that feed-forward part."""

    def layer(shape: ModelShape, prefix: str) -> Layer:
        found = attention_part(shape, prefix) | mlp(shape, prefix)
        if attention.qk_norm:
            found |= head_norms(shape, prefix)
        if attention.qkv_bias:
            found[QKV_BIAS] = ParameterMap(blocks=(separate_qkv(shape, f"{prefix}self_attn.", "bias"),))
        return found

    return layer


FAMILY = Family(
    model_type="glm4_moe",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
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
    },
    variants={"air": {"use_qk_norm": False, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}},
)
