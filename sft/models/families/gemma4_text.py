"""Gemma 4 without its towers: Gemma 3's layers with plain norms, normed values, and other heads in some layers.

Layers that see all positions have larger and fewer KV heads, whose values may be the projected keys; of each head they
rotate a part of the pairs. The output of every layer is multiplied by a number of its own.
"""

from __future__ import annotations

from functools import partial

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import (
    Activation,
    Architecture,
    Attention,
    DecoderLayer,
    DenseMLP,
    Experts,
    SharedExpert,
)
from sft.models.config_reader import ConfigReader
from sft.models.families.gemma2 import GELU_TANH, layer_with_four_norms
from sft.models.family import Config, Family
from sft.models.llama_like import (
    SMALL,
    Layer,
    head_norms,
    joined_experts,
    rope_of,
    shared_expert,
    sliding_layers,
    weight_map_of,
    windows_of,
)
from sft.models.rope import PROPORTIONAL, Rope
from sft.models.weight_map import frozen_vector, vector

_KINDS = ("full_attention", "sliding_attention")
_ROPES: dict[str, Config] = {
    "full_attention": {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
"""Those of a config that states none."""
_AT_TOP = ("partial_rotary_factor", "rope_scaling", "rope_theta")
"""Settings of earlier files, which transformers reads in part here."""


def _read(config: ConfigReader) -> Architecture:
    return read_two_kinds(config, window=512, layer_inputs=256)


def read_two_kinds(config: ConfigReader, *, window: int, layer_inputs: int) -> Architecture:
    """Return the architecture. `window` and the width of embeddings of each layer are what is meant by none stated."""
    shape = config.shape
    _refuse_other_parts(config, layer_inputs)
    mlp = _feed_forward(config, config.choice("hidden_activation", GELU_TANH))
    windows = _windows(config, window)
    everywhere, in_window = (_rope(config, kind) for kind in _KINDS)
    layers = [
        DecoderLayer(
            attention=Attention(
                heads=shape.wide_heads if window is None else None,
                rope=everywhere if window is None else in_window,
                window=window,
                qk_norm=True,
                value_norm=True,
                softmax_scale=1.0,
            ),
            mlp=mlp,
            norm_after=True,
            scaled=True,
        )
        for window in windows
    ]
    return Architecture(
        shape=shape,
        layers=tuple(layers),
        weights=weight_map_of(shape, [partial(_layer, mlp, window is not None) for window in windows]),
        layernorm_epsilon=config.not_negative("rms_norm_eps", 1e-6),
        rope=in_window,
        norm="late_rounded_rms",
        embedding_multiplier=shape.hidden_size**0.5,
        embedding_multiplier_is_rounded=True,
        logits_softcap=config.softcap("final_logit_softcapping", None),
    )


def _feed_forward(config: ConfigReader, activation: Activation) -> DenseMLP | Experts:
    shape = config.shape
    if not config.flag("enable_moe_block", default=False):
        return DenseMLP(width=shape.ffn_hidden_size, activation=activation)
    for key in ("num_experts", "top_k_experts", "moe_intermediate_size"):
        config.count(key, 0)
    return Experts(
        count=shape.num_experts,
        chosen=shape.experts_per_token,
        width=shape.expert_ffn_hidden_size,
        normalized=True,
        shared=SharedExpert(width=shape.shared_expert_size, weighted=False),
        beside_mlp=True,
        scaled_router=True,
        activation=activation,
    )


def _refuse_other_parts(config: ConfigReader, layer_inputs: int) -> None:
    """Refuse what is not built of the family."""
    config.require("num_key_value_heads", "head_dim")
    config.refuse_true("attention_bias")
    shared = config.number("num_kv_shared_layers", 0)
    if shared:
        config.refuse(f"num_kv_shared_layers {shared:g} is not supported: no layer takes the keys of another; only 0")
    # Without layers that share keys and values no MLP is wider; heads of single layers are in the shape.
    config.asked.update(("attention_k_eq_v", "use_double_wide_mlp", "per_layer_config"))
    inputs = config.number("hidden_size_per_layer_input", layer_inputs)
    if inputs:
        config.refuse(
            f"hidden_size_per_layer_input {inputs:g} is not supported: embeddings of each layer (Gemma 4 E2B and E4B) "
            "are not built; only 0"
        )
    config.asked.add("use_bidirectional_attention")
    seen = config.values.get("use_bidirectional_attention")
    if seen not in (None, "vision"):  # that of "vision" is among tokens of images, which training has none of
        config.refuse(f"use_bidirectional_attention {seen!r} is not supported; tokens see those before them")


def _windows(config: ConfigReader, default: int) -> list[int | None]:
    """Return each layer's window, by `layer_types` or else in all but each sixth layer. The last one has none."""
    layers = config.shape.num_layers
    stated = config.values.get("layer_types")
    if isinstance(stated, list) and len(stated) != layers:
        config.refuse(f"layer_types has {len(stated)} entries for {layers} layers")
    sliding = sliding_layers(config)
    if sliding is None:
        sliding = [(layer + 1) % 6 != 0 for layer in range(layers)]
    return windows_of(config, [*sliding[:-1], False], default=default)


def _rope(config: ConfigReader, kind: str) -> Rope | None:
    """Return the rotary positions of layers of a kind."""
    for key in _AT_TOP:
        if kind == _KINDS[0] and config.values.get(key) is not None:
            config.refuse(f"{key} {config.values[key]} is not supported here; rope_parameters state it for each kind")
    stated = config.values.get("rope_parameters")
    ropes = _ROPES if stated is None else stated
    own = ropes.get(kind) if isinstance(ropes, dict) else None
    if not isinstance(own, dict) or "rope_theta" not in own:
        config.refuse(
            f"rope_parameters has no settings with a rope_theta for {kind}; it must hold them for either kind"
        )
        own = _ROPES[kind]
    part = own.get("rope_type") == PROPORTIONAL
    return rope_of(config, kinds=("default", PROPORTIONAL), partial=part, values={"rope_parameters": own})


def _layer(mlp: DenseMLP | Experts, windowed: bool, shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer."""
    own = shape.for_layers(windowed=windowed)
    scale = frozen_vector(f"{prefix}layer_scalar", 1)
    found = layer_with_four_norms(own, prefix) | head_norms(own, prefix) | {"output_scale": scale}
    if isinstance(mlp, DenseMLP):
        return found
    before = ("pre_mlp_layernorm.", "mlp.")
    kept = {name: part for name, part in found.items() if not name.startswith(before)}
    return kept | _experts_beside_mlp(shape, prefix)


def _experts_beside_mlp(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer's MLP, its experts, and the norms before and behind either."""
    norms = {
        "norm_before_shared": "pre_feedforward_layernorm",
        "norm_before_experts": "pre_feedforward_layernorm_2",
        "norm_after_shared": "post_feedforward_layernorm_1",
        "norm_after_experts": "post_feedforward_layernorm_2",
    }
    return {
        **joined_experts(shape, f"{prefix}router.proj.weight", f"{prefix}experts."),
        "mlp.router.scale": vector(f"{prefix}router.scale", shape.hidden_size),
        "mlp.router.expert_scale": vector(f"{prefix}router.per_expert_scale", shape.num_experts),
        **shared_expert(shape, f"{prefix}mlp."),
        **{
            f"mlp.{ours}.weight": vector(f"{prefix}{theirs}.weight", shape.hidden_size)
            for ours, theirs in norms.items()
        },
    }


FAMILY = Family(
    model_type="gemma4_text",
    read=_read,
    small_config={
        **SMALL,
        "head_dim": 16,
        "global_head_dim": 24,
        "num_global_key_value_heads": 6,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "tie_word_embeddings": True,
        "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "final_logit_softcapping": 1.5,
        "rope_parameters": {
            "full_attention": {"rope_type": PROPORTIONAL, "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        },
    },
    variants={
        "one_key_head": {"num_global_key_value_heads": 1},
        "experts": {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24},
        "separate_values": {
            "attention_k_eq_v": False,
            "final_logit_softcapping": None,
            "tie_word_embeddings": False,
            "use_bidirectional_attention": "vision",
        },
    },
)
