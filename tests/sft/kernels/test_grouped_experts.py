"""Tokens to their experts and back: against one dense product for each expert, with experts that get none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.grouped_experts import assign, expert_products, from_experts, looped_products, to_experts

TOKENS, CHOSEN, EXPERTS, HIDDEN, WIDTH = 13, 2, 5, 8, 6


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, weights of the choice, the choice (expert 3 is nobody's), and the experts' matrices."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    weights = torch.rand(TOKENS, CHOSEN, generator=generator, dtype=dtype, requires_grad=True)
    scores = torch.rand(TOKENS, EXPERTS, generator=generator)
    scores[:, 3] = -1.0
    matrices = torch.randn(EXPERTS, WIDTH, HIDDEN, generator=generator, dtype=dtype, requires_grad=True)
    return tokens, weights, scores.topk(CHOSEN).indices, matrices


def by_definition(tokens: Tensor, weights: Tensor, chosen: Tensor, matrices: Tensor) -> Tensor:
    rows = [
        sum(weight * (matrices[expert] @ token) for weight, expert in zip(own, experts, strict=True))
        for token, own, experts in zip(tokens, weights, chosen.tolist(), strict=True)
    ]
    return torch.stack(rows)


def test_values_and_gradients() -> None:
    tokens, weights, chosen, matrices = case()
    assignment = assign(chosen, EXPERTS)
    rows = looped_products(to_experts(tokens, assignment), matrices, assignment.ends)
    found = from_experts(rows, weights, assignment)
    expected = by_definition(tokens, weights, chosen, matrices)
    torch.testing.assert_close(found, expected.float())
    inputs = (tokens, weights, matrices)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6))
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, upstream),
        torch.autograd.grad(expected, inputs, upstream.double()),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    tokens, _, chosen, matrices = case()
    assignment = assign(chosen, EXPERTS)
    looped_products(to_experts(tokens, assignment), matrices, assignment.ends).sum().backward()
    assert matrices.grad is not None
    assert matrices.grad[3].count_nonzero() == 0
    assert matrices.grad[0].count_nonzero() > 0


def test_equal_experts_keep_the_order_of_the_tokens() -> None:
    assignment = assign(torch.tensor([[1, 0], [1, 2], [0, 1]]), 4)
    assert assignment.source.tolist() == [1, 4, 0, 2, 5, 3]
    assert assignment.ends.tolist() == [2, 5, 6, 6]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_one_grouped_product_is_the_loop() -> None:
    tokens, _, chosen, matrices = case(torch.float32)
    assignment = assign(chosen, EXPERTS)
    rows = to_experts(tokens, assignment)
    grouped = F.grouped_mm(rows, matrices.transpose(1, 2), offs=assignment.ends)
    torch.testing.assert_close(grouped, expert_products(rows, matrices, assignment.ends))
