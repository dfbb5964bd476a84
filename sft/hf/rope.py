"""Rotary positions of a Hugging Face config: read, refused by name, and turned into inverse frequencies.

Covered are the scalings that are constants: plain, `linear`, and Llama 3's with any numbers (Megatron-core's own has
low 1, high 4 and 8192 positions built in). Computed as transformers computes them, in fp32, bit for bit.

Refused are `dynamic`, `longrope` and `yarn`: the first two choose other frequencies when a batch is long, so that a
token's rotation would depend on its neighbours in the batch; yarn also scales attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_SCALED = ("linear", "llama3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long waves are slowed down by the factor, short ones stay, between them a ramp."""

    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions of all layers."""

    theta: float
    fraction: float = 1.0
    """Part of each head that is rotated."""
    factor: float = 1.0
    """How much slower positions turn."""
    llama3: Llama3Scaling | None = None
    """None: all frequencies are divided by the factor."""

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians a position, one for each rotated pair of a head."""
        dim = int(head_dim * self.fraction)
        plain = 1.0 / (self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim))
        if self.llama3 is None:
            return plain / self.factor
        low, high, original = (
            self.llama3.low_freq_factor,
            self.llama3.high_freq_factor,
            self.llama3.original_positions,
        )
        wave = 2 * math.pi / plain
        scaled = torch.where(wave > original / low, plain / self.factor, plain)
        ramp = (original / wave - low) / (high - low)
        between = ~(wave < original / high) & ~(wave > original / low)
        return torch.where(between, (1 - ramp) * scaled / self.factor + ramp * scaled, scaled)


def read_rope(config: dict[str, Any], *, max_position_embeddings: int, partial: bool) -> tuple[Rope | None, list[str]]:
    """The rotary positions of a config, or what of them is not covered; `partial`: the family reads a fraction."""
    settings = _settings(config)
    problems = _problems(settings, max_position_embeddings, partial)
    if problems:
        return None, problems
    kind = settings["rope_type"]
    scaling = None
    if kind == "llama3":
        scaling = Llama3Scaling(
            low_freq_factor=float(settings["low_freq_factor"]),
            high_freq_factor=float(settings["high_freq_factor"]),
            original_positions=int(settings.get("original_max_position_embeddings", max_position_embeddings)),
        )
    return (
        Rope(
            theta=float(settings["rope_theta"]),
            fraction=float(settings["partial_rotary_factor"]),
            factor=float(settings["factor"]) if kind in _SCALED else 1.0,
            llama3=scaling,
        ),
        [],
    )


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in the form of transformers 5, with its precedence; earlier files keep them at top level."""
    rope = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    return rope


def _problems(rope: dict[str, Any], max_position_embeddings: int, partial: bool) -> list[str]:
    """What of these settings is not covered."""
    problems = []
    fraction = rope["partial_rotary_factor"]
    if not partial and fraction != 1.0:
        problems.append(f"partial_rotary_factor {fraction} is not supported; only 1.0")
    if not _is_number(rope["rope_theta"]) or any(isinstance(value, dict) for value in rope.values()):
        problems.append("RoPE settings that differ between layers are not supported")
    kind = rope["rope_type"]
    if kind == "default":
        return problems
    if kind not in _SCALED:
        return [*problems, f"rope_type {kind!r} is not supported; supported are 'default', 'linear', 'llama3'"]
    numbers = {"original_max_position_embeddings": max_position_embeddings, **rope}
    needed = ("factor", *(_LLAMA3_KEYS if kind == "llama3" else ()))
    missing = [key for key in needed if not _is_number(numbers.get(key))]
    if missing:
        problems.append(f"rope_type {kind!r} without a number for {', '.join(missing)}")
    elif kind == "llama3" and not 0 < numbers["low_freq_factor"] < numbers["high_freq_factor"]:
        problems.append(
            f"rope_type 'llama3' with low_freq_factor {numbers['low_freq_factor']} and high_freq_factor "
            f"{numbers['high_freq_factor']}; the first must be above 0 and below the second"
        )
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
