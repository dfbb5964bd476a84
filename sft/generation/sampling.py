"""From logits to the next token: the likeliest, or one drawn from a filtered distribution.

Each prompt draws from a stream of its own, seeded by the prompt's number. So a prompt's answer does not depend on
which other prompts are in its batch, nor on which rank answers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.contract.spec import EvaluationSpec


def stream(seed: int, prompt: int) -> torch.Generator:
    """The stream of draws of one prompt."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch reads 32 bits of a seed


def penalized(logits: Tensor, before: Tensor, penalty: float) -> Tensor:
    """`logits` [rows, vocabulary] with those of the tokens in `before` [rows, s] made less likely.

    Keskar et al. 2019 (CTRL), section 4.1, in the form that transformers gave it: a negative logit is multiplied.
    """
    held = logits.gather(1, before)
    return logits.scatter(1, before, torch.where(held > 0, held / penalty, held * penalty))


def next_tokens(logits: Tensor, spec: EvaluationSpec, streams: Sequence[torch.Generator | None]) -> Tensor:
    """Return on the host the token after each row of `logits` [rows, vocabulary], 0 for a row without a stream."""
    if spec.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    chosen = torch.zeros(len(streams), dtype=torch.int64)
    for row, own in enumerate(streams):
        if own is not None:
            chosen[row] = draw(logits[row].double().cpu(), spec, own)
    return chosen


def draw(logits: Tensor, spec: EvaluationSpec, own: torch.Generator) -> int:
    """One token of logits [vocabulary] after temperature, then top_k, then top_p.

    The token at which the cumulated probability passes top_p is kept, so that there is always one.
    """
    ordered, tokens = torch.sort(logits / spec.temperature, descending=True, stable=True)
    if spec.top_k is not None:
        ordered, tokens = ordered[: spec.top_k], tokens[: spec.top_k]
    probabilities = torch.softmax(ordered, dim=0)
    before = torch.cumsum(probabilities, dim=0) - probabilities
    probabilities = torch.where(before < spec.top_p, probabilities, 0.0)
    cumulated = torch.cumsum(probabilities, dim=0)
    place = torch.rand((), generator=own, dtype=torch.float64) * cumulated[-1]
    return int(tokens[int(torch.searchsorted(cumulated, place, right=True).clamp(max=len(tokens) - 1))])
