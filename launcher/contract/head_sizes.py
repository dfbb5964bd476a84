"""Attention heads of layers without a window, where they have sizes of their own (Gemma 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.contract.errors import ModelError

LARGEST_FLASH_HEAD = 256
"""Numbers of the largest head that FlashAttention-2 takes. Sequences with larger ones are computed by torch's own
attention, one by one."""
_SIZES = ("head_dim", "num_key_value_heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSizes:
    """The heads of some layers."""

    head_dim: int
    query_groups: int
    """KV heads."""
    keyed_values: bool = False
    """Whether values are the projected keys, so that there is no projection of values."""


def read_wide_heads(config: Mapping[str, object], windowed: Sequence[int], where: str) -> HeadSizes:
    """Return the heads of the layers that are not `windowed`, or raise ModelError. `where` names the file.

    Published files state them for all these layers at once; transformers writes them for each layer.
    """
    keyed = bool(config.get("attention_k_eq_v"))
    usual = {"head_dim": config.get("head_dim", 256), "num_key_value_heads": config.get("num_key_value_heads", 4)}
    if "per_layer_config" in config:
        own = _of_each_layer(config, windowed, where)
    else:
        own = {"head_dim": config.get("global_head_dim", 512)}
        if keyed and config.get("num_global_key_value_heads") is not None:
            own["num_key_value_heads"] = config["num_global_key_value_heads"]
    size, groups = ({**usual, **own}[key] for key in _SIZES)
    for key, value in (("head_dim", size), ("num_key_value_heads", groups)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{where}: {key} {value!r} of layers without a window is not a whole number above 0")
    assert isinstance(size, int)
    assert isinstance(groups, int)
    return HeadSizes(head_dim=size, query_groups=groups, keyed_values=keyed)


def _of_each_layer(config: Mapping[str, object], windowed: Sequence[int], where: str) -> dict[str, object]:
    """Return what `per_layer_config` says of each layer without a window: the same of all, and nothing of others."""
    stated, layers = config["per_layer_config"] or {}, config["num_hidden_layers"]
    assert isinstance(layers, int)
    by_layer = isinstance(stated, Mapping) and all(
        str(layer).isdecimal() and isinstance(own, Mapping) for layer, own in stated.items()
    )
    if not by_layer:
        raise ModelError(f"{where}: per_layer_config must hold settings for each layer that it names, by its number")
    assert isinstance(stated, Mapping)
    wide = [layer for layer in range(layers) if layer not in windowed]
    named = {int(layer): dict(own) for layer, own in stated.items() if own}  # "05" is how transformers may write it
    first = named.get(wide[0], {}) if wide else {}
    expected = dict.fromkeys(wide, first) if first else {}
    if named != expected or not first.keys() <= set(_SIZES):
        raise ModelError(
            f"{where}: per_layer_config is supported where it gives all layers without a window the same "
            f"{' and '.join(_SIZES)}, and other layers nothing"
        )
    return first
