"""Sinks against the softmax with one more entry, in fp64: by definition, and by what a flash kernel returns."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sft.kernels import masked_attention
from sft.kernels.masked_attention import attention_in_blocks, causal_mask
from sft.kernels.sinks import sinks_gradient, with_sinks
from tests.sft.kernels.test_masked_attention import GROUPS, HEADS, KEYS, drawn


def with_drawn_sinks(queries: int = KEYS, groups: int = GROUPS) -> list[Tensor]:
    sinks = torch.randn(HEADS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    query, key, value = drawn(queries)
    repeats = groups // GROUPS
    shared = [tensor.detach().repeat_interleave(repeats, dim=1).requires_grad_() for tensor in (key, value)]
    return [query, *shared, sinks.requires_grad_()]


def by_definition(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, window: int | None = None) -> Tensor:
    shared = [tensor.repeat_interleave(HEADS // tensor.size(1), dim=1) for tensor in (key, value)]
    scores = torch.einsum("bhqd,bhkd->bhqk", query, shared[0]) * query.size(-1) ** -0.5
    weights = scores.exp() * causal_mask(query.size(2), KEYS, window, torch.device("cpu"))
    sums = weights.sum(-1, keepdim=True) + sinks.exp().view(1, -1, 1, 1)
    return torch.einsum("bhqk,bhkd->bhqd", weights / sums, shared[1])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("queries", [KEYS, 4, 1])
@pytest.mark.parametrize("block", [512, 2])
def test_attention_in_blocks(block: int, queries: int, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and all gradients, those of the sinks among them."""
    monkeypatch.setattr(masked_attention, "BLOCK", block)
    found, exact = with_drawn_sinks(queries), with_drawn_sinks(queries)
    query, key, value, sinks = found
    outputs = [attention_in_blocks(query, key, value, sinks=sinks, window=window), by_definition(*exact, window=window)]
    torch.testing.assert_close(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for own, other in zip(found, exact, strict=True):
        torch.testing.assert_close(own.grad, other.grad)


def test_a_flash_kernels_sums_are_all_that_sinks_need() -> None:
    """torch's flash kernel for CPUs: its backward pass, given output and sums with sinks, has all other gradients."""
    exact = with_drawn_sinks(groups=HEADS)
    expected = by_definition(*exact)
    grad = torch.randn_like(expected)
    expected.backward(grad)
    query, key, value, sinks = (tensor.detach() for tensor in exact)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    rows = flash(query, key, value, 0.0, True)
    # [b, heads, s, dim] and [b, heads, s] -> tokens first, as packed sequences have them
    contexts, sums = zip(
        *(with_sinks(context.transpose(0, 1), log_sum, sinks) for context, log_sum in zip(*rows, strict=True)),
        strict=True,
    )
    context, log_sum = torch.stack(contexts).transpose(1, 2), torch.stack(sums)
    torch.testing.assert_close(context, expected)
    found = backward(grad, query, key, value, context, log_sum, 0.0, True)
    for own, other in zip(found, exact, strict=False):
        torch.testing.assert_close(own, other.grad)
    of_sinks = sum(
        sinks_gradient(part.transpose(0, 1), contexts[row], sums[row], sinks) for row, part in enumerate(grad)
    )
    torch.testing.assert_close(of_sinks, exact[3].grad)
