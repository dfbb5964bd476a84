"""What families with latent attention share: it is read from a config, and mapped to the files' tensors.

linear_down has the rows of q_a_proj, where there is one, and then those of kv_a_proj_with_mqa: the latent of keys and
values, and the part of the keys that is rotated. The other linears are one tensor of the files each. Where files have
rotated pairs side by side (`rope_interleave`), their rows are moved apart (`sft.models.neighbour_pairs`).
"""

from __future__ import annotations

import math

from launcher.contract.model_shape import ModelShape
from sft.models.architecture import Attention
from sft.models.config_reader import ConfigReader
from sft.models.llama_like import Layer, LayerMap, attention_part
from sft.models.neighbour_pairs import heads_apart
from sft.models.rope import rope_settings
from sft.models.weight_map import ParameterMap, Piece, vector, whole

SMALL_LATENT: dict[str, object] = {
    "num_key_value_heads": 6,
    "q_lora_rank": 20,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "attention_bias": True,
}
"""Sizes of a tiny model, none of which is another one's: queries are larger than values."""


def latent_attention(config: ConfigReader) -> Attention:
    """Return the attention of every layer."""
    sizes, shape = config.shape.latent, config.shape
    assert sizes is not None
    config.require("num_key_value_heads")
    if shape.num_query_groups != shape.num_attention_heads:
        config.refuse(
            f"num_key_value_heads {shape.num_query_groups} is not supported: latents make keys and values for each of "
            f"the {shape.num_attention_heads} heads"
        )
    stated = config.values.get("head_dim")
    if stated is not None and stated != sizes.rotary_dim:
        config.refuse(f"head_dim {stated} is not supported; only that of qk_rope_head_dim, {sizes.rotary_dim}, is")
    bias = config.flag("attention_bias", default=False)
    return Attention(
        latent=sizes,
        neighbour_pairs=config.flag("rope_interleave", default=True),
        qkv_bias=bias,
        output_bias=bias,
        softmax_scale=_softmax_scale(config, sizes.query_dim),
    )


def refuse_other_than(config: ConfigReader, **values: object) -> None:
    """Refuse other values than these of settings that published code knows and transformers does not."""
    for key, value in values.items():
        if config.values.get(key, value) != value:
            config.refuse(f"{key} {config.values[key]!r} is not supported; transformers would compute as for {value!r}")


def _softmax_scale(config: ConfigReader, query_dim: int) -> float:
    """Return the factor on scores. `mscale_all_dim` of a RoPE that is scaled makes it larger, by transformers' formula.

    That is beside what the same key does to sines and cosines.
    """
    scale, settings = float(query_dim**-0.5), rope_settings(config.values)
    growth, factor = settings.get("mscale_all_dim"), settings.get("factor")
    if settings["rope_type"] == "default" or not growth:
        return scale
    if isinstance(growth, int | float) and isinstance(factor, int | float):
        magnitude = 0.1 * growth * math.log(factor) + 1.0 if factor > 1 else 1.0
        return scale * magnitude * magnitude
    config.refuse(
        f"mscale_all_dim {growth!r} and factor {factor!r} of a scaled RoPE are not both numbers, and the softmax scale "
        "is made of them"
    )
    return scale


def with_latents(attention: Attention, mlp: LayerMap) -> LayerMap:
    """Return what maps a layer with this attention and that feed-forward part."""

    def layer(shape: ModelShape, prefix: str) -> Layer:
        norms = {name: part for name, part in attention_part(shape, prefix).items() if "self_attention." not in name}
        of_mlp = {name: part for name, part in mlp(shape, prefix).items() if name.startswith("mlp.")}
        return {**norms, **_latent_part(shape, attention, f"{prefix}self_attn."), **of_mlp}

    return layer


def _latent_part(shape: ModelShape, attention: Attention, prefix: str) -> Layer:
    sizes, hidden, heads = shape.latent, shape.hidden_size, shape.num_attention_heads
    assert sizes is not None
    own, made = "self_attention.", heads * (sizes.plain_dim + sizes.value_dim)
    found = {
        f"{own}linear_down.weight": ParameterMap(
            blocks=(_down(attention, prefix, "weight"),), columns=hidden, split=None
        ),
        f"{own}kv_norm.weight": vector(f"{prefix}kv_a_layernorm.weight", sizes.key_rank),
        f"{own}linear_kv.weight": whole(f"{prefix}kv_b_proj.weight", made, sizes.key_rank, 0),
        f"{own}linear_proj.weight": whole(f"{prefix}o_proj.weight", hidden, heads * sizes.value_dim, 1),
    }
    rank, name = sizes.query_rank, "q_proj" if sizes.query_rank is None else "q_b_proj"
    if rank is not None:
        found[f"{own}q_norm.weight"] = vector(f"{prefix}q_a_layernorm.weight", rank)
    queries = _rotated(attention, Piece(f"{prefix}{name}.weight", 0, heads * sizes.query_dim), sizes.query_dim)
    found[f"{own}linear_q.weight"] = ParameterMap(blocks=(queries,), columns=rank or hidden)
    if attention.qkv_bias:
        found[f"{own}linear_down.bias"] = ParameterMap(blocks=(_down(attention, prefix, "bias"),), split=None)
    if attention.output_bias:
        found[f"{own}linear_proj.bias"] = vector(f"{prefix}o_proj.bias", hidden)
    return found


def _down(attention: Attention, prefix: str, kind: str) -> tuple[Piece, ...]:
    """Return the rows of linear_down."""
    sizes = attention.latent
    assert sizes is not None
    rows = sizes.key_rank + sizes.rotary_dim
    of_keys = _rotated(attention, Piece(f"{prefix}kv_a_proj_with_mqa.{kind}", 0, rows), rows)
    if sizes.query_rank is None:
        return of_keys
    return (Piece(f"{prefix}q_a_proj.{kind}", 0, sizes.query_rank), *of_keys)


def _rotated(attention: Attention, piece: Piece, size: int) -> tuple[Piece, ...]:
    """Return rows of which the last of each `size` are rotated, those of a pair apart."""
    sizes = attention.latent
    assert sizes is not None
    if not attention.neighbour_pairs:
        return (piece,)
    return tuple(heads_apart(piece, size, sizes.rotary_dim // 2, before=size - sizes.rotary_dim))
