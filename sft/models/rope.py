"""Rotary positions of a Hugging Face config: read, refused by name, and made into inverse frequencies.

Covered are plain RoPE, `linear`, `yarn`, and Llama 3's with any numbers (Megatron-core's own has low 1, high 4 and 8192
positions built in). Computed as transformers computes them, in fp32, bit for bit.

`dynamic` and `longrope` rotate differently once a batch is longer than some length. Up to that length, `Rope.longest`,
they are constants like the others, and only so far are they covered. Rejected: their frequencies for longer rows. How a
token is rotated would then depend on its neighbours in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the launcher reads architectures where torch is not installed
    import torch

Settings = dict[str, object]
"""RoPE settings of a config, as they were read."""

KINDS = ("default", "dynamic", "linear", "llama3", "longrope", "yarn")
"""The values of `rope_type` that any family may have."""
PROPORTIONAL = "proportional"
"""Another one, of families that ask for it."""

_NEEDED = {
    "dynamic": ("factor",),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("original_max_position_embeddings",),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Numbers without which a kind means nothing."""
_OPTIONAL = {
    "longrope": ("factor", "attention_factor"),
    PROPORTIONAL: ("factor",),
    "yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
}
"""Numbers that a kind may leave out."""
_DIVISORS = {
    "linear": ("factor",),
    "llama3": ("factor",),
    PROPORTIONAL: ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""Numbers that a kind divides by, or takes the logarithm of: with 0 and less it would give NaN, or mean nothing."""
_OF_ORIGINAL_POSITIONS = ("llama3", "longrope", "yarn")
"""Kinds for which `original_max_position_embeddings` at the top of a config comes before that among the settings."""
_OF_ALL_POSITIONS = ("dynamic", "longrope")
"""Kinds that `max_position_embeddings` changes even where the original positions are stated."""
_OF_SINGLE_FAMILIES = ("alpha", "llama_4_scaling_beta", "mrope_section", "xdrope_section")
"""Settings that change queries and keys in those families whose code reads them."""


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
        import torch

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
    proportional: bool = False
    """Whether it is that part of the pairs, each half a head apart and as fast as if all were rotated; else the first
    numbers of a head are rotated like a head of that size."""
    factor: float = 1.0
    """How much slower positions rotate."""
    pair_factors: tuple[float, ...] = ()
    """How much slower each pair of a head rotates, where they differ (LongRoPE)."""
    llama3: Llama3Scaling | None = None
    yarn: YarnScaling | None = None
    """Neither this nor llama3: all frequencies are divided by the factor."""
    attention_factor: float = 1.0
    """Sines and cosines are multiplied by it."""
    longest: int | None = None
    """Tokens of the longest row for which transformers has these frequencies; None where they hold for any."""

    def pairs(self, head_dim: int) -> int:
        """Return how many pairs of a head are rotated, those by an angle of 0 included."""
        if self.proportional:
            return head_dim // 2
        return len(range(0, int(head_dim * self.fraction), 2))

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Return the radians per position of each rotated pair of a head."""
        import torch

        if self.proportional:
            return self._of_first_pairs(head_dim)
        dim = int(head_dim * self.fraction)
        pairs = self.theta ** (torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)
        if self.pair_factors:
            return 1.0 / (torch.tensor(self.pair_factors, dtype=torch.float32, device="cpu") * pairs)
        plain = 1.0 / pairs
        if self.yarn is not None:
            kept = 1 - self.yarn.ramp(self.theta, dim)
            return 1.0 / (self.factor * pairs) * (1 - kept) + plain * kept
        return plain / self.factor if self.llama3 is None else self._by_wave(plain, self.llama3)

    def _of_first_pairs(self, head_dim: int) -> torch.Tensor:
        """Return the frequencies of which all but those of the first pairs are 0."""
        import torch

        rotated = int(self.fraction * head_dim // 2)
        pairs = torch.arange(0, 2 * rotated, 2, dtype=torch.float32, device="cpu")
        still = torch.zeros(head_dim // 2 - rotated, dtype=torch.float32, device="cpu")
        return torch.cat([1.0 / self.theta ** (pairs / head_dim), still]) / self.factor

    def _by_wave(self, plain: torch.Tensor, llama3: Llama3Scaling) -> torch.Tensor:
        """Return frequencies of which Llama 3's scaling slows down those with long waves."""
        import torch

        low, high, original = llama3.low_freq_factor, llama3.high_freq_factor, llama3.original_positions
        wave = 2 * math.pi / plain
        scaled = torch.where(wave > original / low, plain / self.factor, plain)
        ramp = (original / wave - low) / (high - low)
        between = ~(wave < original / high) & ~(wave > original / low)
        return torch.where(between, (1 - ramp) * scaled / self.factor + ramp * scaled, scaled)


def read_rope(
    config: Mapping[str, object],
    *,
    max_position_embeddings: int | None,
    partial: bool,
    default_theta: float = 10000.0,
    default_fraction: float = 1.0,
    understood: Collection[str] = (),
) -> tuple[Rope | None, list[str]]:
    """Return the rotary positions of a config, or None and what of them is not covered.

    `max_position_embeddings` is None where the config states none. What is meant then differs between families.
    `partial` says that the family reads `partial_rotary_factor`; `default_theta` and `default_fraction` are its theta
    and the rotated part of its heads where none is stated; `understood` are settings of single families that this one
    reads by itself.
    """
    stated = rope_settings(config, default_theta, default_fraction)
    settings = {"original_max_position_embeddings": max_position_embeddings, **stated}
    problems = _problems(settings, partial, understood)
    kind = settings["rope_type"]
    if max_position_embeddings is None and kind in _OF_ALL_POSITIONS:
        problems.append(f"rope_type {kind!r} without max_position_embeddings, which it depends on; state it")
    if problems:
        return None, problems
    positions = max_position_embeddings or 0  # of no kind that it changes
    original = int(_number(settings, "original_max_position_embeddings", positions))
    return (
        Rope(
            theta=_number(settings, "rope_theta"),
            fraction=_number(settings, "partial_rotary_factor"),
            proportional=kind == PROPORTIONAL,
            # Dynamic scaling begins beyond the longest row that is covered.
            factor=1.0 if kind in ("default", "dynamic", "longrope") else _number(settings, "factor", 1.0),
            pair_factors=_numbers(settings, "short_factor") if kind == "longrope" else (),
            llama3=_llama3(settings, original) if kind == "llama3" else None,
            yarn=_yarn(settings, original) if kind == "yarn" else None,
            attention_factor=_attention_factor(settings, positions / max(original, 1)),
            longest={"dynamic": positions, "longrope": original}.get(str(kind)),
        ),
        [],
    )


def rope_settings(
    config: Mapping[str, object], default_theta: float = 10000.0, default_fraction: float = 1.0
) -> Settings:
    """Return RoPE settings in the form of transformers 5, with its precedence. Earlier files have them at top level."""
    stated = config.get("rope_scaling") or config.get("rope_parameters")
    rope: Settings = dict(stated) if isinstance(stated, dict) else {}
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", config.get("rope_theta", default_theta))
    rope.setdefault("partial_rotary_factor", config.get("partial_rotary_factor", default_fraction))
    if "original_max_position_embeddings" in config and rope["rope_type"] in _OF_ORIGINAL_POSITIONS:
        rope["original_max_position_embeddings"] = config["original_max_position_embeddings"]
    return rope


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


def _attention_factor(settings: Settings, stretch: float) -> float:
    """Return it as stated, or by the formulas of the papers. `mscale` and `mscale_all_dim` count only as a pair.

    `stretch` is the number of positions over the original one.
    """
    kind = settings["rope_type"]
    if kind not in _OPTIONAL or kind == PROPORTIONAL:
        return 1.0
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")
    log = math.log(max(_number(settings, "factor", stretch), 1.0))
    if kind == "longrope":
        return math.sqrt(1 + log / math.log(_number(settings, "original_max_position_embeddings")))
    above, below = _number(settings, "mscale"), _number(settings, "mscale_all_dim")
    if above and below:
        return (0.1 * above * log + 1.0) / (0.1 * below * log + 1.0)
    return 0.1 * log + 1.0


def _problems(rope: Settings, partial: bool, understood: Collection[str]) -> list[str]:
    """Return what of these settings is not covered."""
    problems = []
    fraction = rope["partial_rotary_factor"]
    if not _is_number(fraction):
        problems.append(f"partial_rotary_factor {fraction} is not a number")
    elif not partial and fraction != 1.0:
        problems.append(f"partial_rotary_factor {fraction} is not supported; only 1.0")
    elif rope["rope_type"] == PROPORTIONAL and not 0 <= _number(rope, "partial_rotary_factor") <= 1:
        problems.append(f"partial_rotary_factor {fraction} is not from 0 to 1")
    if not _is_number(rope["rope_theta"]) or any(isinstance(value, dict) for value in rope.values()):
        problems.append("RoPE settings that differ between layers are not supported")
    elif _number(rope, "rope_theta") <= 0:
        problems.append(f"rope_theta {rope['rope_theta']} is not above 0: there would be no frequencies")
    for key in _OF_SINGLE_FAMILIES:
        if rope.get(key) is not None and key not in understood:
            problems.append(f"the RoPE setting {key} {rope[key]} is not supported for this model type")
    kind = rope["rope_type"]
    if kind not in (*KINDS, PROPORTIONAL):
        return [*problems, f"rope_type {kind!r} is not supported; supported are {', '.join(map(repr, KINDS))}"]
    return [*problems, *_problems_of_kind(str(kind), rope)]


def _problems_of_kind(kind: str, rope: Settings) -> list[str]:
    """Return which numbers of a scaling are missing or mean nothing."""
    missing = [key for key in _NEEDED.get(kind, ()) if not _is_number(rope.get(key))]
    missing += [key for key in _OPTIONAL.get(kind, ()) if rope.get(key) is not None and not _is_number(rope[key])]
    if missing:
        return [f"rope_type {kind!r} without a number for {', '.join(missing)}"]
    unfit = [key for key in _DIVISORS.get(kind, ()) if rope.get(key) is not None and _number(rope, key) <= 0]
    if unfit:
        return [f"rope_type {kind!r} with {key} {rope[key]}, which is not above 0" for key in unfit]
    if kind == "longrope" and not _numbers(rope, "short_factor"):
        return ["rope_type 'longrope' without a list of numbers for short_factor"]
    if kind == "longrope" and min(_numbers(rope, "short_factor")) <= 0:
        return ["rope_type 'longrope' with a number in short_factor that is not above 0"]
    if kind == "longrope" and _number(rope, "original_max_position_embeddings") <= 1:
        return ["rope_type 'longrope' with original_max_position_embeddings of 1 or less"]
    if kind == "yarn" and _number(rope, "rope_theta") == 1:
        return ["rope_type 'yarn' with rope_theta 1, in whose logarithms it measures"]
    if kind == "yarn" and min(_number(rope, "beta_fast"), _number(rope, "beta_slow")) < 0:
        return ["rope_type 'yarn' with a beta_fast or beta_slow below 0"]
    if kind == "yarn" and _attention_factor(rope, 1.0) < 1:
        return [f"rope_type 'yarn' with an attention factor of {_attention_factor(rope, 1.0):.4g}, below 1"]
    if kind == "llama3" and not 0 < _number(rope, "low_freq_factor") < _number(rope, "high_freq_factor"):
        return [
            f"rope_type 'llama3' with low_freq_factor {rope['low_freq_factor']} and high_freq_factor "
            f"{rope['high_freq_factor']}; the first must be above 0 and below the second"
        ]
    return []


def _numbers(settings: Settings, key: str) -> tuple[float, ...]:
    """Return the list of numbers under `key`, empty where there is none."""
    values = settings.get(key)
    if not isinstance(values, list):
        return ()
    numbers = tuple(float(value) for value in values if isinstance(value, (int, float)))
    return numbers if len(numbers) == len(values) else ()


def _number(settings: Settings, key: str, default: float = 0.0) -> float:
    """Return the number under `key`, or the default. `_problems` has checked that required ones are there."""
    value = settings.get(key)
    return float(value) if isinstance(value, (int, float)) else default


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
