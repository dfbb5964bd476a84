"""Linear attention in a model's config.json: its sizes, and which layers have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict

from launcher.contract.errors import ModelError

_SIZES = {
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
"""Keys, and what transformers takes where they are absent."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearAttention:
    """A gated delta net, whose state does not grow with the tokens that it has seen."""

    key_heads: int
    value_heads: int
    """A multiple of the key heads, each of which serves as many, one behind the other."""
    key_dim: int
    """Size of a head of queries or keys."""
    value_dim: int
    kernel: int
    """Tokens that the convolution of queries, keys and values sees."""

    @property
    def keys(self) -> int:
        """The width of all key heads together, which is that of all queries, too."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """The width of all value heads together."""
        return self.value_heads * self.value_dim

    @property
    def convolved(self) -> int:
        """The number of channels of the convolution."""
        return 2 * self.keys + self.values

    @property
    def projected(self) -> int:
        """The outputs of the input projection: what is convolved, a gate for each value, two numbers per value head."""
        return self.convolved + self.values + 2 * self.value_heads

    @property
    def parameters(self) -> int:
        """The number of weights beside those of the two projections, without biases."""
        return self.convolved * self.kernel + self.value_heads + self.value_dim


class LinearLayers(TypedDict, total=False):
    """What a model's shape has of it; nothing for models without."""

    linear: LinearAttention
    linear_layers: tuple[int, ...]
    output_gate: bool


def read_linear_layers(config: Mapping[str, object], layers: int, where: str) -> LinearLayers:
    """Return the linear attention of a config of `layers` layers, or raise ModelError. `where` names the file.

    The attention of the other layers has a gate on its output.
    """
    sizes = {key: config.get(key, default) for key, default in _SIZES.items()}
    key_heads, value_heads, key_dim, value_dim, kernel = (
        size if isinstance(size, int) and size > 0 else 0 for size in sizes.values()
    )
    if not all((key_heads, value_heads, key_dim, value_dim, kernel)) or value_heads % key_heads:
        stated = ", ".join(f"{key} {size}" for key, size in sizes.items())
        raise ModelError(
            f"{where}: {stated}; these must be whole numbers above 0, and the value heads a multiple of the key heads"
        )
    return {
        "linear": LinearAttention(
            key_heads=key_heads, value_heads=value_heads, key_dim=key_dim, value_dim=value_dim, kernel=kernel
        ),
        "linear_layers": _linear_layers(config, layers, where),
        "output_gate": True,
    }


def _linear_layers(config: Mapping[str, object], layers: int, where: str) -> tuple[int, ...]:
    """Return which layers are linear: by `layer_types`, or else all but every `full_attention_interval`-th."""
    kinds, interval = config.get("layer_types"), config.get("full_attention_interval", 4)
    if isinstance(kinds, list):
        return tuple(layer for layer, kind in enumerate(kinds[:layers]) if kind == "linear_attention")
    if not isinstance(interval, int) or interval < 1:
        raise ModelError(f"{where}: full_attention_interval {interval!r} is not a whole number above 0")
    return tuple(layer for layer in range(layers) if (layer + 1) % interval)
