"""The protocol of a weight's gradient buffer, and that one module alone speaks it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import sft
from sft.kernels.gradient_buffer import buffer_of, has_gradient


def weight_with_buffer() -> Tensor:
    weight = torch.zeros(3, 2, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad = torch.full((3, 2), 7.0), False  # type: ignore[attr-defined]
    return weight


def test_the_first_product_overwrites_and_later_ones_add() -> None:
    weight = weight_with_buffer()
    buffer = buffer_of(weight)
    assert buffer is not None and buffer.is_empty and not has_gradient(weight)
    a, b = torch.ones(3, 4), torch.ones(4, 2)
    buffer.add_product(a, b)
    assert not buffer.is_empty and has_gradient(weight)
    assert buffer.values.unique().tolist() == [4.0]  # the 7 stands for what is never read: real buffers are zeroed
    buffer.add_product(a, b)
    assert buffer.values.unique().tolist() == [8.0]


def test_the_answer_says_that_the_gradient_was_added() -> None:
    weight = weight_with_buffer()
    buffer = buffer_of(weight)
    assert buffer is not None
    assert buffer.answer().shape == weight.shape
    assert has_gradient(weight)


def test_a_weight_outside_of_data_parallelism_has_none() -> None:
    assert buffer_of(torch.zeros(2)) is None
    assert not has_gradient(torch.zeros(2))


@pytest.mark.parametrize("attribute", ["main_grad", "grad_added_to_main_grad", "zero_out_wgrad"])
def test_no_other_module_touches_the_attributes(attribute: str) -> None:
    root = Path(sft.__file__).parent
    forms = (f".{attribute}", f'"{attribute}"')
    users = [path for path in root.rglob("*.py") if any(form in path.read_text(encoding="utf-8") for form in forms)]
    assert [path.name for path in users] == ["gradient_buffer.py"]
