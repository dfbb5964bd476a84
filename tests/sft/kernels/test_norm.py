"""A norm's output that is freed and computed again."""

from __future__ import annotations

import gc
import weakref

import torch

from sft.kernels import norm


def gradients(again: bool) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x, branch, weight, matrix = (
        torch.randn(*shape, generator=draw).requires_grad_() for shape in ((6, 1, 8), (6, 1, 8), (8,), (8, 8))
    )
    normed, past = norm.add_and_fork(branch, x, weight, 1e-5)
    result = normed @ matrix  # keeps its input for backward
    if again:
        norm.forget(normed, past, weight, 1e-5, result)
        assert normed.untyped_storage().nbytes() == 0
    (result * past).sum().backward()
    return [tensor.grad for tensor in (x, branch, weight, matrix) if tensor.grad is not None]


def test_nothing_changes_but_memory() -> None:
    kept, again = gradients(False), gradients(True)
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
