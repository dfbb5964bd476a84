"""Families whose files turn neighbouring dimensions of a head together (GLM, Cohere, ERNIE), as RoPE's paper does.

All kernels here turn dimension i with dimension i + half. Such a family's rows are put in that order as they are read,
and back as they are written: of each query and key head first the even rows of its rotated part, then the odd ones.
Products of queries and keys are sums over the same terms.

Rejected: a second order in the kernels. Each of them, and the cache of answers, would have to know it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from launcher.contract.model_shape import ModelShape
from sft.models.llama_like import QKV, QKV_BIAS, Layer
from sft.models.rope import Rope
from sft.models.weight_map import ParameterMap, Piece


def pairs_apart(layer: Layer, shape: ModelShape, rope: Rope | None) -> Layer:
    """Return the maps of a layer whose files have the two rows of each rotated pair side by side.

    `rope` is None where its settings are refused.
    """
    pairs = 0 if rope is None else rope.pairs(shape.head_dim)
    return layer | {name: _apart(layer[name], shape, pairs) for name in (QKV, QKV_BIAS) if name in layer}


def _apart(joined: ParameterMap, shape: ModelShape, pairs: int) -> ParameterMap:
    (block,) = joined.blocks
    found: list[Piece] = []
    for index, piece in enumerate(block):
        is_value = index % 3 == 2  # of each group its queries, its key, its value
        found += [piece] if is_value else heads_apart(piece, shape.head_dim, pairs)
    return replace(joined, blocks=(tuple(found),))


def heads_apart(piece: Piece, head_dim: int, pairs: int, before: int = 0) -> Iterator[Piece]:
    """Yield the rows of several heads, each with its rotated pairs apart, which begin `before` rows behind its own."""
    for begin in range(piece.start, piece.stop, head_dim):
        first = begin + before
        rotated, end = first + 2 * pairs, begin + head_dim
        if before:
            yield replace(piece, start=begin, stop=first)
        if pairs:
            yield replace(piece, start=first, stop=rotated, step=2)
            yield replace(piece, start=first + 1, stop=rotated, step=2)
        if rotated < end:
            yield replace(piece, start=rotated, stop=end)
