"""OLMoE: Llama's attention with norms over all query and key heads, and experts in place of every MLP."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, Experts
from sft.models.config_reader import ConfigReader
from sft.models.families.olmo2 import width_norms
from sft.models.family import Family
from sft.models.llama_like import SILU, SMALL, Layer, attention_part, rope_of, separate_experts, weight_map


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_experts_per_tok")
    if not shape.num_experts:
        config.refuse("no num_experts (transformers 5 also writes num_local_experts), which an olmoe config must state")
    config.refuse_true("attention_bias", "mlp_bias", "sliding_window")
    if config.values.get("clip_qkv") == 0:  # it clips for transformers, too; other bounds are refused in all families
        config.refuse("clip_qkv 0 is not supported")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.ffn_hidden_size,
        normalized=config.flag("norm_topk_prob", default=False),
        activation=config.choice("hidden_act", SILU),
    )
    return Architecture(
        shape=shape,
        layers=(DecoderLayer(attention=Attention(width_norm=True), mlp=experts),) * shape.num_layers,
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config),
    )


def _layer(shape: ModelShape, prefix: str) -> Layer:
    experts = separate_experts(shape, f"{prefix}mlp.gate.weight", f"{prefix}mlp.experts.{{}}.")
    return attention_part(shape, prefix) | width_norms(shape, prefix) | experts


FAMILY = Family(
    model_type="olmoe",
    read=_read,
    small_config={
        **SMALL,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        # transformers' defaults are tokens beyond a small vocabulary
        "eos_token_id": 2,
        "pad_token_id": 0,
    },
    variants={"normalized": {"norm_topk_prob": True}},
)
