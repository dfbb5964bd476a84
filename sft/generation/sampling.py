"""Choose the next token from logits: the most likely one, or a random one from a filtered distribution.

Each prompt has its own random stream, seeded by the prompt's number. So its answer depends neither on the other prompts
of the batch nor on the rank that answers it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from launcher.contract.spec import EvaluationSpec


def stream(seed: int, prompt: int) -> torch.Generator:
    """Return the random stream of one prompt."""
    digest = hashlib.sha256(f"{seed} {prompt}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))  # torch reads 32 bits of a seed


def penalized(logits: Tensor, before: Tensor, penalty: float) -> Tensor:
    """Return `logits` [rows, vocabulary] with the tokens of `before` [rows, s] made less likely.

    The penalty of CTRL (Keskar et al. 2019, section 4.1) as transformers has it: negative logits are multiplied by it.
    """
    held = logits.gather(1, before)
    return logits.scatter(1, before, torch.where(held > 0, held / penalty, held * penalty))


def next_tokens(logits: Tensor, spec: EvaluationSpec, streams: Sequence[torch.Generator | None]) -> Tensor:
    """Return the next token of each row of `logits` [rows, vocabulary], in host memory.

    With a temperature, a row without a stream gets token 0.
    """
    if spec.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    chosen = torch.zeros(len(streams), dtype=torch.int64)
    for row, own in enumerate(streams):
        if own is not None:
            chosen[row] = draw(logits[row].double().cpu(), spec, own)
    return chosen


def draw(logits: Tensor, spec: EvaluationSpec, own: torch.Generator) -> int:
    """Return a random token by logits [vocabulary], after temperature, then top_k, then top_p.

    The token at which the cumulative probability reaches top_p is kept, so that there is always one.
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
