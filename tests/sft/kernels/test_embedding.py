"""The lookup that adds its gradient to a buffer, against torch's own, in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft.kernels.embedding import lookup

VOCAB, HIDDEN = 7, 5


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return a weight, ids with repetitions, and a gradient of the lookup's result."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, HIDDEN, generator=draw, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[3, 3, 0, 6], [3, 2, 6, 3]])
    return weight, ids, torch.randn(*ids.shape, HIDDEN, generator=draw, dtype=torch.float64)


def test_equals_torch() -> None:
    weight, ids, grad = inputs()
    found = lookup(weight, ids, partial=False)
    found.backward(grad)
    plain, _, _ = inputs()
    expected = F.embedding(ids, plain)
    expected.backward(grad)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(weight.grad, plain.grad)


def test_gradient_is_added_to_the_buffer() -> None:
    weight, ids, grad = inputs()
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False  # type: ignore[attr-defined]
    lookup(weight, ids, partial=False).backward(grad)
    plain, _, _ = inputs()
    F.embedding(ids, plain).backward(grad)
    assert plain.grad is not None
    torch.testing.assert_close(weight.main_grad, (1 + plain.grad).float(), rtol=1e-6, atol=1e-6)  # type: ignore[attr-defined]
    assert weight.grad_added_to_main_grad  # type: ignore[attr-defined]
    assert weight.grad is not None  # hooks that count finished gradients ask for one


@pytest.mark.parametrize("buffered", [False, True])
def test_a_part_of_the_vocabulary_leaves_other_ids_alone(buffered: bool) -> None:
    """Look up on a rank with rows 2 to 5: ids of other ranks are negative or too large."""
    weight, ids, grad = inputs()
    own = weight.detach()[2:6].clone().requires_grad_()
    if buffered:
        own.main_grad, own.grad_added_to_main_grad = torch.zeros(own.shape), False  # type: ignore[attr-defined]
    found = lookup(own, ids - 2, partial=True)
    found.backward(grad)
    here = ((ids >= 2) & (ids < 6)).unsqueeze(-1)
    torch.testing.assert_close(found, F.embedding(ids, weight) * here)
    expected = torch.zeros(weight.shape, dtype=torch.float64).index_add_(0, ids.flatten(), grad.flatten(0, 1))[2:6]
    result = own.main_grad.double() if buffered else own.grad  # type: ignore[attr-defined]
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
