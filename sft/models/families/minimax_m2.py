"""MiniMax-M2: OLMoE's norms over all heads, heads rotated in part, and experts chosen by sigmoids and a bias.

The published weights are in fp8, which is refused: a copy in bf16 trains.
"""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import MIXTRAL_NAMES
from sft.models.architecture import Architecture, Attention, DecoderLayer, Experts
from sft.models.config_reader import ConfigReader
from sft.models.families.olmo2 import width_norms
from sft.models.family import Family
from sft.models.llama_like import SILU, SMALL, Layer, attention_part, rope_of, separate_experts, weight_map
from sft.models.weight_map import frozen_vector


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok")
    config.flag("use_qk_norm", default=True)  # published configs state it; transformers has the norms whatever it says
    _refuse_other_sizes(config)
    if config.number("router_jitter_noise", 0.0) != 0:
        config.refuse("router_jitter_noise is not supported: a token's experts must not be random; set it to 0")
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.ffn_hidden_size,
        normalized=True,
        scores="sigmoid",
        selection_bias=True,
        activation=config.choice("hidden_act", SILU),
    )
    # Published configs state the rotated part by its size.
    rotated = config.number("rotary_dim", shape.head_dim) / shape.head_dim
    return Architecture(
        shape=shape,
        layers=(DecoderLayer(attention=Attention(width_norm=True), mlp=experts),) * shape.num_layers,
        weights=weight_map(shape, _layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config, partial=True, default_theta=5000000.0, default_fraction=rotated),
    )


def _refuse_other_sizes(config: ConfigReader) -> None:
    """Refuse other names of sizes: of transformers for the same, and of other families."""
    sizes = {"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"}
    for other, own in sizes.items():
        if other in config.values:
            config.refuse(f"{other} is not supported for model type {config.shape.model_type}; state {own} alone")
    if config.shape.shared_expert_size:
        config.refuse("shared experts are not supported: transformers builds none for this model type")


def _layer(shape: ModelShape, prefix: str) -> Layer:
    block = f"{prefix}block_sparse_moe."
    return {
        **attention_part(shape, prefix),
        **width_norms(shape, prefix),
        **separate_experts(shape, f"{block}gate.weight", f"{block}experts.{{}}.", MIXTRAL_NAMES),
        "mlp.router.bias": frozen_vector(f"{block}e_score_correction_bias", shape.num_experts),
    }


FAMILY = Family(
    model_type="minimax_m2",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "rotary_dim": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        # transformers' defaults are tokens beyond a small vocabulary
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    variants={"all_rotated": {"partial_rotary_factor": 1.0, "tie_word_embeddings": True}},
)
