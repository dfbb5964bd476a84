"""Tokens to their experts and back: against one dense product for each expert, with experts that get none."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.expert_mlp import swiglu_experts
from sft.kernels.grouped_experts import (
    assign,
    expert_products,
    looped_products,
    sort_rows,
    sum_of_experts,
    to_experts,
    unsort_rows,
)

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
    found = sum_of_experts(rows * sort_rows(weights.flatten(), assignment).unsqueeze(-1), assignment)
    expected = by_definition(tokens, weights, chosen, matrices)
    assert_same(found, expected, (tokens, weights, matrices))


def assert_same(found: Tensor, expected: Tensor, inputs: tuple[Tensor, ...]) -> None:
    """Compare values and, for a random gradient of them, the gradients of the inputs."""
    torch.testing.assert_close(found, expected)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(6), dtype=expected.dtype)
    ours, theirs = (torch.autograd.grad(values, inputs, upstream) for values in (found, expected))
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other)


def test_swiglu_of_all_experts_in_one_operation() -> None:
    """Its weights multiply before the second product, and by definition they multiply after it."""
    tokens, weights, chosen, up = case()
    assignment = assign(chosen, EXPERTS)
    down = torch.randn(EXPERTS, HIDDEN, WIDTH // 2, dtype=up.dtype, requires_grad=True)
    rows, by_row = to_experts(tokens, assignment), sort_rows(weights.flatten(), assignment)
    found = swiglu_experts(rows, by_row, up.flatten(0, 1), down.flatten(0, 1), assignment.ends)
    gate, other = looped_products(rows, up, assignment.ends).chunk(2, dim=-1)
    expected = looped_products(F.silu(gate) * other, down, assignment.ends) * by_row.unsqueeze(-1)
    assert_same(found, expected, (tokens, weights, up, down))


def test_gradients_are_added_to_a_buffer() -> None:
    """As Megatron-core keeps them: the first product of a step overwrites zeros, the others are added."""
    tokens, _, chosen, up = case(torch.float32)
    assignment = assign(chosen, EXPERTS)
    weight = torch.nn.Parameter(up.detach().flatten(0, 1))
    weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False  # type: ignore[attr-defined]
    down = torch.randn(EXPERTS * HIDDEN, WIDTH // 2)
    ones = torch.ones(TOKENS * CHOSEN)
    for _ in range(2):
        rows = to_experts(tokens, assignment)
        swiglu_experts(rows, ones, weight, down, assignment.ends).sum().backward()
    plain = up.detach().flatten(0, 1).requires_grad_()
    swiglu_experts(to_experts(tokens, assignment), ones, plain, down, assignment.ends).sum().backward()
    assert plain.grad is not None
    torch.testing.assert_close(weight.main_grad, 2 * plain.grad)


def test_rows_come_back_to_their_places() -> None:
    _, _, chosen, _ = case()
    assignment = assign(chosen, EXPERTS)
    values = torch.arange(TOKENS * CHOSEN)
    assert sort_rows(values, assignment).tolist() == assignment.source.tolist()
    assert unsort_rows(sort_rows(values, assignment), assignment).equal(values)
    assert assignment.counts().tolist() == torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()


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
