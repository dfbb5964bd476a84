"""Sliding windows in a model's config.json: how many positions a token sees, and in which layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from launcher.contract.model_types import WindowRule


def read_windows(config: Mapping[str, object], layers: int, rule: WindowRule) -> tuple[int | None, tuple[int, ...]]:
    """Return the window and which of so many layers have it. None and () where no layer has one."""
    window = config.get("sliding_window", rule.default)
    if not isinstance(window, int):
        return None, ()
    found = _windowed_layers(config, range(layers), rule)
    if rule.last_sees_all:
        found = [layer for layer in found if layer != layers - 1]
    return (window, tuple(found)) if found else (None, ())


def _windowed_layers(config: Mapping[str, object], layers: Sequence[int], rule: WindowRule) -> list[int]:
    used = bool(config.get("use_sliding_window"))
    if rule.layers == "all" or (rule.layers == "all_or_none" and used):
        return list(layers)
    if rule.layers == "all_or_none":
        return []
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        return [layer for layer, kind in zip(layers, kinds, strict=False) if kind == "sliding_attention"]
    if rule.layers == "all_but_each":
        stated = None if rule.last_sees_all else config.get("sliding_window_pattern")
        each = stated if stated and isinstance(stated, int) else rule.each  # families that read it refuse all else
        return [layer for layer in layers if (layer + 1) % each]
    bound = config.get("max_window_layers", 28)
    bound = bound if isinstance(bound, int) else 28  # families that read it refuse anything else
    if rule.layers == "even_below_bound":
        return [layer for layer in layers if used and layer < bound and layer % 2 == 0]
    return [layer for layer in layers if used and layer >= bound]
