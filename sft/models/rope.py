"""Rotary positions of a Hugging Face config: read, refused by name, and made into inverse frequencies.

Covered are the scalings that are constants: plain, `linear`, `yarn`, and Llama 3's with any numbers (Megatron-core's
own has low 1, high 4 and 8192 positions built in). Computed as transformers computes them, in fp32, bit for bit.

Refused are `dynamic` and `longrope`: they choose other frequencies when a batch is long, so that a token's rotation
would depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

Settings = dict[str, object]
"""RoPE settings of a config, as they were read."""

_LLAMA3_KEYS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN_KEYS = ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
"""What a yarn config may leave out."""
_SCALED = ("linear", "llama3", "yarn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Llama3Scaling:
    """Llama 3.1's scaling: long waves are slowed down by the factor, short ones stay, between them a ramp."""

    low_freq_factor: float
    high_freq_factor: float
    original_positions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class YarnScaling:
    """YaRN (arXiv 2309.00071): pairs of a head that rotate often over the first training stay, slow ones are slowed."""

    beta_fast: float
    """Turns over the original positions from which on a pair stays as it is."""
    beta_slow: float
    """Turns up to which it is slowed by the whole factor."""
    original_positions: int
    truncate: bool
    """Whether the ramp between the two begins and ends at whole pairs."""

    def ramp(self, theta: float, dim: int) -> torch.Tensor:
        """Return how much each pair is slowed: 0 not at all, 1 by the whole factor."""
        low, high = (self._pair_with(turns, theta, dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        width = 0.001 if low == high else high - low
        return ((torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / width).clamp(0, 1)

    def _pair_with(self, turns: float, theta: float, dim: int) -> float:
        return dim * math.log(self.original_positions / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rope:
    """Rotary positions of all layers."""

    theta: float
    fraction: float = 1.0
    """Part of each head that is rotated."""
    factor: float = 1.0
    """How much slower positions rotate."""
    llama3: Llama3Scaling | None = None
    yarn: YarnScaling | None = None
    """Neither this nor llama3: all frequencies are divided by the factor."""
    attention_factor: float = 1.0
    """Sines and cosines are multiplied by it."""

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Return the radians per position of each rotated pair of a head."""
        dim = int(head_dim * self.fraction)
        pairs = self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        plain = 1.0 / pairs
        if self.yarn is not None:
            kept = 1 - self.yarn.ramp(self.theta, dim)
            return 1.0 / (self.factor * pairs) * (1 - kept) + plain * kept
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


def read_rope(
    config: Mapping[str, object],
    *,
    max_position_embeddings: int,
    partial: bool,
    default_theta: float = 10000.0,
    default_fraction: float = 1.0,
) -> tuple[Rope | None, list[str]]:
    """Return the rotary positions of a config, or None and what of them is not covered.

    `partial` says that the family reads `partial_rotary_factor`; `default_theta` and
    `default_fraction` are its theta and the rotated part of its heads where none is stated.
    """
    settings = _settings(config, default_theta, default_fraction)
    problems = _problems(settings, max_position_embeddings, partial)
    if problems:
        return None, problems
    kind = settings["rope_type"]
    original = int(_number(settings, "original_max_position_embeddings", max_position_embeddings))
    return (
        Rope(
            theta=_number(settings, "rope_theta"),
            fraction=_number(settings, "partial_rotary_factor"),
            factor=_number(settings, "factor") if kind in _SCALED else 1.0,
            llama3=_llama3(settings, original) if kind == "llama3" else None,
            yarn=_yarn(settings, original) if kind == "yarn" else None,
            attention_factor=_attention_factor(settings) if kind == "yarn" else 1.0,
        ),
        [],
    )


def _llama3(settings: Settings, original_positions: int) -> Llama3Scaling:
    return Llama3Scaling(
        low_freq_factor=_number(settings, "low_freq_factor"),
        high_freq_factor=_number(settings, "high_freq_factor"),
        original_positions=original_positions,
    )


def _yarn(settings: Settings, original_positions: int) -> YarnScaling:
    return YarnScaling(
        beta_fast=_number(settings, "beta_fast") or 32.0,
        beta_slow=_number(settings, "beta_slow") or 1.0,
        original_positions=original_positions,
        truncate=bool(settings.get("truncate", True)),
    )


def _attention_factor(settings: Settings) -> float:
    """Return it as stated, or by the paper's formula. `mscale` and `mscale_all_dim` count only as a pair."""
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")
    above, below = _number(settings, "mscale"), _number(settings, "mscale_all_dim")
    log = math.log(max(_number(settings, "factor"), 1.0))
    if above and below:
        return (0.1 * above * log + 1.0) / (0.1 * below * log + 1.0)
    return 0.1 * log + 1.0


def _settings(config: Mapping[str, object], default_theta: float, default_fraction: float) -> Settings:
    """Return RoPE settings in the form of transformers 5, with its precedence. Earlier files have them at top level."""
    stated = config.get("rope_scaling") or config.get("rope_parameters")
    rope: Settings = dict(stated) if isinstance(stated, dict) else {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", default_theta))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", default_fraction))
    if "original_max_position_embeddings" in config:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


def _problems(rope: Settings, max_position_embeddings: int, partial: bool) -> list[str]:
    """Return what of these settings is not covered."""
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
        return [*problems, f"rope_type {kind!r} is not supported; supported are 'default', 'linear', 'llama3', 'yarn'"]
    numbers: Settings = {"original_max_position_embeddings": max_position_embeddings, **rope}
    needed = ("factor", *(_LLAMA3_KEYS if kind == "llama3" else ()))
    missing = [key for key in needed if not _is_number(numbers.get(key))]
    if kind == "yarn":
        missing += [key for key in _YARN_KEYS if rope.get(key) is not None and not _is_number(rope[key])]
    if missing:
        problems.append(f"rope_type {kind!r} without a number for {', '.join(missing)}")
    elif kind == "yarn" and _attention_factor(rope) < 1:
        problems.append(f"rope_type 'yarn' with an attention factor of {_attention_factor(rope):.4g}, below 1")
    elif kind == "llama3" and not 0 < _number(numbers, "low_freq_factor") < _number(numbers, "high_freq_factor"):
        problems.append(
            f"rope_type 'llama3' with low_freq_factor {numbers['low_freq_factor']} and high_freq_factor "
            f"{numbers['high_freq_factor']}; the first must be above 0 and below the second"
        )
    return problems


def _number(settings: Settings, key: str, default: float = 0.0) -> float:
    """Return the number under `key`, or the default. `_problems` has checked that required ones are there."""
    value = settings.get(key)
    return float(value) if isinstance(value, (int, float)) else default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
