"""gpt-oss (20b, 120b): a trained sink in every softmax, windows in every other layer, and experts with biases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, ClampedUnit, DecoderLayer, Experts
from sft.models.config_reader import ConfigReader
from sft.models.families.gemma2 import alternating_windows
from sft.models.family import Family
from sft.models.llama_like import FC1, SILU, SMALL, Biases, Layer, attention_part, rope_of, weight_map
from sft.models.weight_map import MXFP4_BLOCK, ParameterMap, Piece, WeightMap, vector, whole

_THETA = 150000.0


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    # Defaults of transformers that a file without them need not have meant: those of the 120b model.
    config.require("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "sliding_window")
    if not (config.values.get("rope_parameters") or config.values.get("rope_scaling")):
        config.refuse(
            "no rope_parameters, which a gpt_oss config must state"
        )  # null is another default in transformers
    biased = config.flag("attention_bias", default=True)
    experts = _experts(config)
    layers = tuple(
        DecoderLayer(attention=Attention(window=window, sinks=True, qkv_bias=biased, output_bias=biased), mlp=experts)
        for window in alternating_windows(config, interval=2)
    )
    weights = weight_map(shape, partial(_layer, biases=Biases(attention=biased)))
    return Architecture(
        shape=shape,
        layers=layers,
        weights=replace(weights, mxfp4=_matrices(weights)) if _is_mxfp4(config) else weights,
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-5),
        rope=rope_of(config, default_theta=_THETA),
        norm="late_rounded_rms",
    )


def _is_mxfp4(config: ConfigReader) -> bool:
    """Return whether the files hold experts in MXFP4, as published ones do. Other quantizations are refused."""
    settings = config.values.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "mxfp4":
        return False
    config.asked.add("quantization_config")
    if config.shape.hidden_size % MXFP4_BLOCK or config.shape.expert_ffn_hidden_size % MXFP4_BLOCK:
        config.refuse(
            f"quantization_config mxfp4: hidden_size {config.shape.hidden_size} and intermediate_size "
            f"{config.shape.expert_ffn_hidden_size} must be multiples of {MXFP4_BLOCK}"
        )
    return True


def _matrices(weights: WeightMap) -> frozenset[str]:
    """Return the tensors that hold the matrices of experts."""
    maps = [part for layer in weights.layers for part in layer.values() if part.experts and part.columns is not None]
    return frozenset(part.pieces[0].name for part in maps)


def _experts(config: ConfigReader) -> Experts:
    shape = config.shape
    config.choice("hidden_act", SILU)  # stated by published configs, and read by nobody: the unit is a fixed one
    return Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        # The softmax over a token's own experts.
        normalized=True,
        router_bias=True,
        clamped=ClampedUnit(slope=config.positive("swiglu_alpha", 1.702), limit=config.positive("swiglu_limit", 7.0)),
        bias=True,
    )


def _layer(shape: ModelShape, prefix: str, biases: Biases) -> Layer:
    router = f"{prefix}mlp.router."
    return {
        **attention_part(shape, prefix, biases),
        "self_attention.core_attention.sinks": whole(
            f"{prefix}self_attn.sinks", shape.num_attention_heads, None, split=0
        ),
        "mlp.router.weight": whole(f"{router}weight", shape.num_experts, shape.hidden_size, None),
        "mlp.router.logit_bias": vector(f"{router}bias", shape.num_experts),
        **_expert_part(shape, f"{prefix}mlp.experts."),
    }


def _expert_part(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of the experts: one tensor each for all of them, of matrices [input, output].

    Gate and up projection alternate in it, column by column.
    """
    hidden, width, count = shape.hidden_size, shape.expert_ffn_hidden_size, shape.num_experts

    def halves(name: str) -> tuple[tuple[Piece, ...], ...]:
        return tuple(
            (Piece(f"{prefix}{name}", first, 2 * width, expert, step=2),) for expert in range(count) for first in (0, 1)
        )

    def outputs(name: str) -> tuple[tuple[Piece, ...], ...]:
        return tuple((Piece(f"{prefix}{name}", 0, hidden, expert),) for expert in range(count))

    return {
        FC1: ParameterMap(blocks=halves("gate_up_proj"), columns=hidden, experts=count, transposed=True),
        "mlp.linear_fc1.bias": ParameterMap(blocks=halves("gate_up_proj_bias"), experts=count),
        "mlp.linear_fc2.weight": ParameterMap(
            blocks=outputs("down_proj"), columns=width, split=1, experts=count, transposed=True
        ),
        "mlp.linear_fc2.bias": ParameterMap(blocks=outputs("down_proj_bias"), split=None, experts=count),
    }


FAMILY = Family(
    model_type="gpt_oss",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "sliding_window": 12,
        # One in a hundred values reaches it. With more, one whose rounding decides whether it does shows in gradients.
        "swiglu_limit": 2.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": _THETA,
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    variants={
        "unbiased": {
            "attention_bias": False,
            "tie_word_embeddings": True,
            "swiglu_alpha": 1.2,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        }
    },
)
