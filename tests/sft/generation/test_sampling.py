"""Draws: temperature, top_k and top_p do what their names say, and each prompt has its own stream."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from launcher.contract.spec import EvaluationSpec
from sft.generation.sampling import draw, next_tokens, penalized, stream

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0], dtype=torch.float64)


def shares(spec: EvaluationSpec, draws: int = 4000) -> list[float]:
    own = stream(1, 0)
    counts = Counter(draw(LOGITS, spec, own) for _ in range(draws))
    return [counts[token] / draws for token in range(len(LOGITS))]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_shares_are_the_softmax(temperature: float) -> None:
    expected = torch.softmax(LOGITS / temperature, dim=0).tolist()
    assert shares(EvaluationSpec(temperature=temperature)) == pytest.approx(expected, abs=0.03)


def test_top_k_leaves_the_likeliest() -> None:
    expected = torch.softmax(LOGITS[[0, 4]], dim=0).tolist()
    found = shares(EvaluationSpec(temperature=1.0, top_k=2))
    assert [found[0], found[4]] == pytest.approx(expected, abs=0.03)
    assert found[1] == found[2] == found[3] == 0


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.01, {4}), (0.6, {4}), (0.7, {4, 0}), (0.9, {4, 0, 1}), (1.0, set(range(5)))]
)
def test_top_p_keeps_the_token_that_passes_it(top_p: float, kept: set[int]) -> None:
    """Probabilities in order: 0.64, 0.23, 0.09, 0.03, 0.01."""
    found = shares(EvaluationSpec(temperature=1.0, top_p=top_p))
    assert {token for token, share in enumerate(found) if share} == kept


def test_temperature_0_takes_the_likeliest() -> None:
    rows = torch.stack([LOGITS, -LOGITS])
    assert next_tokens(rows, EvaluationSpec(), [None, None]).tolist() == [4, 3]


def test_a_prompt_draws_the_same_in_any_company() -> None:
    spec = EvaluationSpec(temperature=1.0)
    alone = [int(next_tokens(LOGITS[None], spec, [own])) for own in [stream(5, 3)] for _ in range(8)]
    own, rows = stream(5, 3), torch.stack([LOGITS, LOGITS])
    together = [next_tokens(rows, spec, [None, own]).tolist() for _ in range(8)]
    assert together == [[0, token] for token in alone]


def test_streams_differ_by_seed_and_prompt() -> None:
    first = [torch.rand(4, generator=stream(seed, prompt)).tolist() for seed in (0, 1, 2**40) for prompt in (0, 1)]
    assert len({tuple(values) for values in first}) == 6


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    rows, before = torch.stack([LOGITS, -LOGITS]), torch.tensor([[0, 3, 0], [4, 1, 2]])
    expected = RepetitionPenaltyLogitsProcessor(1.3)(before, rows.clone())
    assert torch.equal(penalized(rows, before, 1.3), expected)
    assert not torch.equal(expected, rows)
