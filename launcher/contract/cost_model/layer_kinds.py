"""The kinds of decoder layers of a model under one precision: layers of a kind cost the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import Fp8Spec
from launcher.contract.stages import chunk_ranges


class LayerKind(NamedTuple):
    """What sets layers of one model apart. A named tuple, since searches look them up a million times."""

    dense: bool = False
    """An MLP in a model whose other layers have experts."""
    linear: bool = False
    """Linear attention."""
    windowed: bool = False
    """A sliding window."""
    fp8: bool = False
    """Products of its linears in fp8."""


KindCounts = Mapping[LayerKind, int]
"""How many layers there are of each kind."""


def layer_kinds(shape: ModelShape, fp8: Fp8Spec | None) -> tuple[LayerKind, ...]:
    """Return the kind of each layer. `fp8` is None where no product is in fp8."""
    in_fp8 = range(0) if fp8 is None else fp8.layers_in_fp8(shape.num_layers)
    return _kinds(shape.num_layers, shape.dense_layers, shape.linear_layers, shape.windowed_layers, in_fp8)


@lru_cache(maxsize=64)
def _kinds(
    layers: int, dense: tuple[int, ...], linear: tuple[int, ...], windowed: tuple[int, ...], fp8: range
) -> tuple[LayerKind, ...]:
    return tuple(LayerKind(layer in dense, layer in linear, layer in windowed, layer in fp8) for layer in range(layers))


@lru_cache(maxsize=4096)
def counts_by_chunk(kinds: tuple[LayerKind, ...], split: tuple[int, ...]) -> tuple[KindCounts, ...]:
    """Return how many layers of each kind each model chunk has, in the model's order."""
    return tuple(Counter(kinds[layer] for layer in layers) for layers in chunk_ranges(split))


@lru_cache(maxsize=4096)
def counts_by_stage(kinds: tuple[LayerKind, ...], split: tuple[int, ...], stages: int) -> tuple[KindCounts, ...]:
    """Return how many layers of each kind each pipeline stage has."""
    return _by_stage(counts_by_chunk(kinds, split), stages)


@lru_cache(maxsize=4096)
def recomputed_by_chunk(
    kinds: tuple[LayerKind, ...], split: tuple[int, ...], most: int | None
) -> tuple[KindCounts, ...]:
    """Return how many layers of each kind are recomputed in each model chunk: its first ones, `most` of them or all."""
    return tuple(Counter(kinds[layer] for layer in layers[:most]) for layers in chunk_ranges(split))


@lru_cache(maxsize=4096)
def recomputed_by_stage(
    kinds: tuple[LayerKind, ...], split: tuple[int, ...], stages: int, most: int | None
) -> tuple[KindCounts, ...]:
    """Return how many layers of each kind are recomputed in each pipeline stage."""
    return _by_stage(recomputed_by_chunk(kinds, split, most), stages)


def _by_stage(model_chunks: tuple[KindCounts, ...], stages: int) -> tuple[KindCounts, ...]:
    return tuple(sum((Counter(chunk) for chunk in model_chunks[stage::stages]), Counter()) for stage in range(stages))
