"""Biases of experts."""

from __future__ import annotations

import torch
from torch import Tensor

from sft.kernels.expert_bias import add_expert_bias

ENDS = torch.tensor([2, 2, 5, 6], dtype=torch.int32)
"""Of four experts, the second of which has no rows."""


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]), dtype=torch.float64)


def test_each_row_gets_its_experts_bias() -> None:
    rows, bias = drawn(6, 3).requires_grad_(), drawn(4, 3).requires_grad_()
    assert torch.equal(add_expert_bias(rows, bias, ENDS), rows + bias[[0, 0, 2, 2, 2, 3]])
    assert torch.autograd.gradcheck(lambda rows, bias: add_expert_bias(rows, bias, ENDS), (rows, bias))


def test_ranks_that_add_nothing_have_the_gradient_all_the_same() -> None:
    """Two ranks with parts of a sum: together they add each bias once, and both have the sum's gradient of it."""
    parts, bias = [drawn(6, 3), drawn(6, 3) + 1], drawn(4, 3)
    own = [bias.clone().requires_grad_() for _ in parts]
    total = sum(
        add_expert_bias(part, copy, ENDS, here=rank == 0)
        for rank, (part, copy) in enumerate(zip(parts, own, strict=True))
    )
    assert isinstance(total, Tensor)
    assert torch.equal(total, parts[0] + bias[[0, 0, 2, 2, 2, 3]] + parts[1])
    total.square().sum().backward()
    assert own[0].grad is not None and own[0].grad[2].all() and not own[0].grad[1].any()
    assert own[1].grad is not None and torch.equal(own[0].grad, own[1].grad)


def test_without_rows_gradients_are_zero() -> None:
    bias = drawn(4, 3).requires_grad_()
    add_expert_bias(drawn(0, 3), bias, torch.zeros(4, dtype=torch.int32)).sum().backward()
    assert bias.grad is not None and not bias.grad.any()


def test_gradients_of_half_precision_are_added_in_fp32() -> None:
    """In bf16 a sum of ones stops at 256."""
    bias = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor([1024], dtype=torch.int32)
    add_expert_bias(torch.zeros(1024, 1, dtype=torch.bfloat16), bias, ends).sum().backward()
    assert bias.grad is not None and bias.grad.item() == 1024
