"""A norm's output that is freed and computed again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from sft.kernels import norm
from sft.kernels.fp8 import unquantized


def gradients(again: bool, centered: bool = False) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, branch, weight, matrix = (
        torch.randn(*shape, generator=draw).requires_grad_() for shape in ((6, 1, 8), (6, 1, 8), (8,), (8, 8))
    )
    normed, past = norm.add_and_fork(branch, x, weight, 1e-5, centered=centered)
    result = normed @ matrix  # keeps its input for backward
    if again:
        norm.forget(normed, past, weight, 1e-5, result, centered=centered)
        assert normed.untyped_storage().nbytes() == 0
    (result * past).sum().backward()
    return [tensor.grad for tensor in (x, branch, weight, matrix) if tensor.grad is not None]


@pytest.mark.parametrize("centered", [False, True])
def test_nothing_changes_but_memory(centered: bool) -> None:
    kept, again = gradients(False, centered), gradients(True, centered)
    assert len(kept) == 4
    assert all(map(torch.equal, kept, again))


def test_nothing_is_kept_behind_the_backward_pass() -> None:
    """Also where the result is still referenced, as pipeline schedules do until the next one exists."""
    x, weight = torch.randn(6, 1, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    normed, past = norm.fork(x, weight, 1e-5)
    memory = weakref.ref(normed.untyped_storage())
    result = normed.exp()
    norm.forget(normed, past, weight, 1e-5, result)
    del normed, past
    result.sum().backward()
    gc.collect()
    assert result.grad_fn is not None
    assert memory() is None


def test_a_centered_weight_multiplies_as_one_plus_itself() -> None:
    """In fp32 up to the end, as transformers' Gemma does, bit by bit in half precision."""
    draw = torch.Generator().manual_seed(0)
    x, branch = (torch.randn(6, 1, 8, generator=draw).bfloat16() for _ in range(2))
    weight = torch.randn(8, generator=draw).bfloat16()
    expected = Gemma3RMSNorm(8, 1e-5).bfloat16()
    expected.weight.data.copy_(weight)
    normed, past = norm.add_and_fork(branch, x, weight, 1e-5, centered=True)
    assert torch.equal(norm.rms_norm(x, weight, 1e-5, centered=True), expected(x))
    assert torch.equal(unquantized(normed), expected(x + branch))
    assert torch.equal(past, x + branch)
