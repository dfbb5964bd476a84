"""What Qwen3-Next and Qwen3.5 share: linear attention in most layers, and a gate on the attention of the others.

Megatron-core's linear_qkv has for each KV group its query heads, their gates, its key head, its value head, where files
have a query head and its gate in turn. The projection of linear attention is described in
`sft.megatron.layers.gated_delta`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from launcher.contract.linear_attention import LinearAttention
from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Attention
from sft.models.config_reader import ConfigReader
from sft.models.llama_like import (
    QKV,
    Layer,
    LayerMap,
    attention_part,
    head_norms,
    llama_layer,
    rope_of,
    separate_experts,
    shared_expert,
)
from sft.models.rope import Rope
from sft.models.weight_map import ParameterMap, Piece, vector, whole

SMALL_LINEAR: dict[str, object] = {
    "head_dim": 16,
    "linear_num_key_heads": 12,
    "linear_num_value_heads": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}
"""Sizes of a tiny model: several value heads for each key head, which two, three and four ranks divide."""

_ROPES = ("default", "linear", "llama3", "yarn")
"""Those that do not depend on the length of a batch."""


def hybrid_attention(config: ConfigReader) -> list[Attention | LinearAttention]:
    """Return the attention of each layer."""
    shape = config.shape
    kinds = config.list_by_layer("layer_types") or []
    for kind in sorted({str(kind) for kind in kinds} - {"full_attention", "linear_attention"}):
        config.refuse(f"layer_types has {kind!r}; only full_attention and linear_attention are supported")
    if len(shape.linear_layers) == shape.num_layers:
        config.refuse("no layer has full attention; at least one must")
    config.refuse_true("attention_bias")
    if not config.flag("attn_output_gate", default=True):
        config.refuse("attn_output_gate false is not supported")
    if shape.linear is not None and shape.linear.kernel < 2:
        config.refuse(f"linear_conv_kernel_dim {shape.linear.kernel} is not supported; it must be above 1")
    attention = Attention(qk_norm=True, output_gate=True)
    return [
        shape.linear if shape.linear is not None and layer in shape.linear_layers else attention
        for layer in range(shape.num_layers)
    ]


def hybrid_rope(config: ConfigReader) -> Rope | None:
    """Return the rotary positions. On text the three of `mrope_section` are one and the same."""
    return rope_of(config, partial=True, default_fraction=0.25, kinds=_ROPES, understood=("mrope_section",))


def gated_attention(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer with attention, without its MLP."""
    qkv = ParameterMap(blocks=(_queries_and_gates(shape, f"{prefix}self_attn."),), columns=shape.hidden_size)
    return attention_part(shape, prefix) | head_norms(shape, prefix) | {QKV: qkv}


def _queries_and_gates(shape: ModelShape, prefix: str) -> tuple[Piece, ...]:
    """Return the rows of linear_qkv."""
    head, found = shape.head_dim, []
    heads = shape.num_attention_heads // shape.num_query_groups
    for group in range(shape.num_query_groups):
        own = range(group * heads, (group + 1) * heads)
        for first in (0, head):  # queries, then gates
            starts = (2 * head * number + first for number in own)
            found += [Piece(f"{prefix}q_proj.weight", start, start + head) for start in starts]
        found += [Piece(f"{prefix}{which}_proj.weight", group * head, (group + 1) * head) for which in ("k", "v")]
    return tuple(found)


def linear_attention(shape: ModelShape, prefix: str, *, joined: bool) -> Layer:
    """Return the maps of a layer with linear attention, without its MLP.

    With `joined` two tensors hold the projection, by key head, else four: queries, keys and values; gates; betas;
    decays.
    """
    sizes, own = shape.linear, f"{prefix}linear_attn."
    assert sizes is not None
    hidden, heads = shape.hidden_size, range(sizes.key_heads)
    projection = tuple(piece for head in heads for piece in _projection(sizes, own, head, joined=joined))
    convolution = tuple(piece for head in heads for piece in _convolved(sizes, f"{own}conv1d.weight", head))
    norms = {name: part for name, part in llama_layer(shape, prefix).items() if "layernorm" in name}
    return norms | {
        "self_attention.in_proj.weight": ParameterMap(blocks=(projection,), columns=hidden),
        "self_attention.out_proj.weight": whole(f"{own}out_proj.weight", hidden, sizes.values, split=1),
        "self_attention.conv.weight": ParameterMap(blocks=(convolution,), columns=sizes.kernel, depthwise=True),
        "self_attention.A_log": whole(f"{own}A_log", sizes.value_heads, None, split=0),
        "self_attention.dt_bias": whole(f"{own}dt_bias", sizes.value_heads, None, split=0),
        "self_attention.norm.weight": vector(f"{own}norm.weight", sizes.value_dim),
    }


def dense_mlp(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of a layer's MLP."""
    return {name: part for name, part in llama_layer(shape, prefix).items() if name.startswith("mlp.")}


def weighted_experts(shape: ModelShape, prefix: str) -> Layer:
    """Return the maps of experts, three tensors for each, and of a shared one that each token weights."""
    mlp = f"{prefix}mlp."
    return {
        **separate_experts(shape, f"{mlp}gate.weight", f"{mlp}experts.{{}}."),
        **shared_expert(shape, f"{mlp}shared_expert.", weight=f"{mlp}shared_expert_gate.weight"),
    }


def hybrid_layers(shape: ModelShape, mlps: Sequence[LayerMap], *, joined: bool) -> list[LayerMap]:
    """Return what maps each layer: its attention, and one of `mlps`. For `joined` see `linear_attention`."""
    linear = partial(linear_attention, joined=joined)
    kinds = [linear if layer in shape.linear_layers else gated_attention for layer in range(shape.num_layers)]
    return [partial(_both, attention, mlp) for attention, mlp in zip(kinds, mlps, strict=True)]


def _both(attention: LayerMap, mlp: LayerMap, shape: ModelShape, prefix: str) -> Layer:
    return attention(shape, prefix) | mlp(shape, prefix)


def _projection(sizes: LinearAttention, prefix: str, head: int, *, joined: bool) -> list[Piece]:
    """Return the rows of the projection that belong to one key head."""
    served = sizes.value_heads // sizes.key_heads
    if joined:
        widths = {"qkvz": 2 * (sizes.key_dim + served * sizes.value_dim), "ba": 2 * served}
        return [_part(f"{prefix}in_proj_{name}.weight", head, width) for name, width in widths.items()]
    return [
        *_convolved(sizes, f"{prefix}in_proj_qkv.weight", head),
        _part(f"{prefix}in_proj_z.weight", head, served * sizes.value_dim),
        _part(f"{prefix}in_proj_b.weight", head, served),
        _part(f"{prefix}in_proj_a.weight", head, served),
    ]


def _convolved(sizes: LinearAttention, name: str, head: int) -> list[Piece]:
    """Return the rows of a key head in a tensor that holds all queries, then all keys, then all values."""
    values = sizes.value_heads // sizes.key_heads * sizes.value_dim
    return [
        _part(name, head, sizes.key_dim),
        _part(name, head, sizes.key_dim, begin=sizes.keys),
        _part(name, head, values, begin=2 * sizes.keys),
    ]


def _part(name: str, number: int, width: int, begin: int = 0) -> Piece:
    return Piece(name, begin + number * width, begin + (number + 1) * width)
