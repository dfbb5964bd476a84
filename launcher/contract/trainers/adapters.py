"""Rules for LoRA: each trainer has its own words and defaults for the same few settings."""

from __future__ import annotations

from dataclasses import dataclass

from launcher.contract.nemo.entries import Entries, number_of, value_of, whole_number_of
from launcher.contract.nemo.rule import Refused, Translation

_LORA = "model.lora."
_EVERY = ("all-linear", "all_linear", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraWords:
    """What a trainer calls LoRA's settings, and what it takes for those that are absent."""

    rank: str
    alpha: str
    targets: str
    default_rank: int
    alpha_over_rank: float | None
    """Default of alpha as a multiple of the rank, or None for `default_alpha`."""
    default_alpha: float
    default_dropout: float
    default_targets: tuple[str, ...]
    """Empty: every linear layer."""

    def settings(self, entries: Entries) -> Translation:
        """Return rank, alpha, targets and dropout of a file that trains adapters."""
        rank = whole_number_of(entries, self.rank, self.default_rank)
        alpha = self.default_alpha if self.alpha_over_rank is None else self.alpha_over_rank * rank
        given = value_of(entries, self.targets)
        if value_of(entries, "lora_target_linear"):  # axolotl adapts every linear layer beside those that are named
            given = "all-linear"
        targets = list(self.default_targets) if given is None else target_names(given)
        absent = [
            name for name in (self.rank, self.alpha, self.targets, "lora_dropout") if value_of(entries, name) is None
        ]
        return Translation(
            {
                f"{_LORA}rank": rank,
                f"{_LORA}alpha": number_of(entries, self.alpha, alpha),
                f"{_LORA}targets": targets,
                f"{_LORA}dropout": number_of(entries, "lora_dropout", self.default_dropout),
            },
            f"with its own defaults for {', '.join(absent)}" if absent else "",
        )


def target_names(value: object) -> list[str]:
    """Return the layers to adapt: a list, a text with commas, or a word for every linear layer."""
    names = [str(name).strip() for name in value] if isinstance(value, list) else str(value).split(",")
    names = [name.strip() for name in names if name.strip()]
    if any(name in _EVERY for name in names):
        return ["all-linear"]
    patterns = [name for name in names if not name.replace("_", "").isalnum()]
    if patterns:
        raise Refused(f"{', '.join(patterns)}: layers are named one by one (q_proj), patterns are not read")
    return names
