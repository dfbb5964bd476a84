"""What turns logits into a loss, beside the cross-entropy: a cap on logits, and label smoothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossForm:
    """What is between logits and loss, beside the cross-entropy."""

    softcap: float | None = None
    """c, where the loss is of c * tanh(logits / c)."""
    smoothing: float = 0.0
    """Share of each target's probability that is spread over the whole vocabulary: label smoothing."""
    vocabulary: int = 1
    """Tokens of the whole vocabulary."""

    @property
    def each(self) -> float:
        """The probability that smoothing gives to each token."""
        return self.smoothing / self.vocabulary


PLAIN = LossForm()
"""The cross-entropy alone."""
