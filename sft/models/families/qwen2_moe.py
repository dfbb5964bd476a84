"""Qwen 1.5 and 2 with experts: Qwen 2's attention, and experts beside a shared one that each token weights."""

from __future__ import annotations

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP, Experts, SharedExpert
from sft.models.config_reader import ConfigReader
from sft.models.family import Family
from sft.models.llama_like import (
    QKV_BIAS,
    SILU,
    SMALL,
    Layer,
    attention_part,
    llama_layer,
    rope_of,
    separate_experts,
    separate_qkv,
    shared_expert,
    weight_map,
    windows_by_layer,
    windows_of,
)
from sft.models.weight_map import ParameterMap


def _read(config: ConfigReader) -> Architecture:
    shape = config.shape
    config.require("num_key_value_heads", "num_experts_per_tok", "moe_intermediate_size")
    config.require("shared_expert_intermediate_size")
    if not shape.num_experts:
        config.refuse("no num_experts, which a qwen2_moe config must state")
    if not config.flag("qkv_bias", default=True):
        config.refuse("qkv_bias false is not supported")
    config.refuse_true("mlp_bias")
    activation = config.choice("hidden_act", SILU)
    experts = Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=config.flag("norm_topk_prob", default=False),
        shared=SharedExpert(width=shape.shared_expert_size, weighted=True),
        activation=activation,
    )
    dense = DenseMLP(width=shape.ffn_hidden_size, activation=activation)
    layers = [
        DecoderLayer(
            attention=Attention(window=window, qkv_bias=True), mlp=dense if index in shape.dense_layers else experts
        )
        for index, window in enumerate(_windows(config))
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map(shape, _layer, dense=_dense_layer),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=rope_of(config),
    )


def _windows(config: ConfigReader) -> list[int | None]:
    """Return each layer's window: by `layer_types`, or else of every other layer below `max_window_layers`."""
    slides = config.flag("use_sliding_window", default=False)
    if slides and config.values.get("layer_types") is None:
        end = config.number("max_window_layers", 28)
        return windows_of(config, [layer % 2 == 0 and layer < end for layer in range(config.shape.num_layers)])
    windows = windows_by_layer(config)
    if not slides and any(window is not None for window in windows):
        config.refuse("layer_types has sliding layers, and use_sliding_window is false")
    return windows


def _layer(shape: ModelShape, prefix: str) -> Layer:
    mlp = f"{prefix}mlp."
    return {
        **attention_part(shape, prefix),
        QKV_BIAS: _bias(shape, prefix),
        **separate_experts(shape, f"{mlp}gate.weight", f"{mlp}experts.{{}}."),
        **shared_expert(shape, f"{mlp}shared_expert.", weight=f"{mlp}shared_expert_gate.weight"),
    }


def _dense_layer(shape: ModelShape, prefix: str) -> Layer:
    return llama_layer(shape, prefix) | {QKV_BIAS: _bias(shape, prefix)}


def _bias(shape: ModelShape, prefix: str) -> ParameterMap:
    return ParameterMap(blocks=(separate_qkv(shape, f"{prefix}self_attn.", "bias"),))


FAMILY = Family(
    model_type="qwen2_moe",
    read=_read,
    small_config={
        **SMALL,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 36,
        "norm_topk_prob": False,
    },
    variants={"dense_layers": {"mlp_only_layers": [1], "norm_topk_prob": True}},
)
