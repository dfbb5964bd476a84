"""What an architecture computes, as values that a checkpoint records: two that agree in them are the same function.

A `config.json` may be edited between two attempts of a run, or `model.path` name another one. Weights of equal shapes
load all the same, and training would go on as another model.

Left out is what may differ without changing a number: the family's name, how the files lie (`weights`), and how long a
row may be.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping

from launcher.contract.latent_attention import LatentAttention
from launcher.contract.linear_attention import LinearAttention
from sft.models.architecture import Architecture, Attention, DecoderLayer, DenseMLP, Experts
from sft.models.rope import Rope

Values = dict[str, object]
"""Names of fields, with dots, to values that JSON has."""

_SIZES = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "head_dim", "vocab_size"),
    "tied_embeddings",
)
"""Fields of the shape that say how weights are used; what else it has is in the layers, or is no part of the model."""
_BY_LAYER = ("shape", "layers", "weights")
_LIMITS = ("longest",)
_KINDS: tuple[tuple[str, type], ...] = (
    *(("", Architecture), ("layer.", DecoderLayer), ("rope.", Rope), ("attention.rope.", Rope)),
    *(("attention.", Attention), ("attention.", LinearAttention), ("attention.latent.", LatentAttention)),
    *(("mlp.", DenseMLP), ("mlp.", Experts)),
)
"""What the names of fields begin with, by where they are."""
_DIGITS = 12
"""Of numbers that are computed from a config: two machines' logarithms may differ in the last one."""


def numerics(architecture: Architecture) -> Values:
    """Return what an architecture computes. A field that layers do not share has a list, with a value for each layer.

    Fields at their default are left out, so that a record stays valid when a later version knows more of them.
    """
    values: Values = {name: getattr(architecture.shape, name) for name in _SIZES}
    values |= dict(_fields(architecture, "", skipped=_BY_LAYER))
    layers = [dict(_of_layer(layer)) for layer in architecture.layers]
    for name in dict.fromkeys(name for layer in layers for name in layer):
        found = [layer.get(name) for layer in layers]
        values[name] = found[0] if all(value == found[0] for value in found) else found
    return values


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return how two records differ, for people: one text for each field."""
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    return [_difference(name, before.get(name), now.get(name)) for name in names]


def _of_layer(layer: DecoderLayer) -> Iterator[tuple[str, object]]:
    for part in ("attention", "mlp"):
        value = getattr(layer, part)
        yield part, type(value).__name__
        yield from _fields(value, f"{part}.")
    yield from _fields(layer, "layer.", skipped=("attention", "mlp"))


def _fields(value: object, prefix: str, skipped: tuple[str, ...] = ()) -> Iterator[tuple[str, object]]:
    """Yield the fields of a dataclass, and of those inside it, that are not at their default."""
    for field in dataclasses.fields(value):  # type: ignore[arg-type]
        own = getattr(value, field.name)
        if field.name in skipped or field.name in _LIMITS or field.default in (own, _plain(own)):
            continue
        if dataclasses.is_dataclass(own):
            yield f"{prefix}{field.name}", True
            yield from _fields(own, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", _plain(own)


def _plain(value: object) -> object:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


def _difference(name: str, before: object, now: object) -> str:
    """Return one difference.

    Of two lists these are the first items that differ: a model may have a hundred layers.
    """
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        at = next(index for index, pair in enumerate(zip(before, now, strict=True)) if pair[0] != pair[1])
        return _difference(f"{name}[{at}]", before[at], now[at])
    if isinstance(before, list) != isinstance(now, list):  # one of them is the same in all layers
        items = before if isinstance(before, list) else now if isinstance(now, list) else []
        at = next((index for index, item in enumerate(items) if item != (now if items is before else before)), 0)
        pair = (items[at], now) if items is before else (before, items[at])
        return _difference(f"{name}[{at}]", *pair) if items else f"{name} differs"
    was, is_now = (_shown(name, value) for value in (before, now))
    return f"{name} was {was}, is {is_now}"


def _shown(name: str, value: object) -> str:
    """Return a value for people, the default where a record leaves it out."""
    if value is None:
        name = name.partition("[")[0]
        defaults = {prefix + field.name: field.default for prefix, kind in _KINDS for field in dataclasses.fields(kind)}
        value = defaults.get(name, dataclasses.MISSING)
    return "unset" if value is None or value is dataclasses.MISSING else json.dumps(value)
