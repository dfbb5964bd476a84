"""Frozen products with adapters as single operations on a CPU: against torch in fp64, and over fp8 by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.adapted import LowRank, adapted_gated_mlp, adapted_linear
from sft.kernels.gated import Gate
from sft.kernels.linear import GradientForm, gated_mlp

HIDDEN, WIDTH, RANK = 16, 48, 3


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def adapter(rows: int, columns: int, scale: float, dtype: torch.dtype = torch.float64) -> LowRank:
    return LowRank(random(RANK, columns, dtype=dtype), random(rows, RANK, dtype=dtype), scale)


def merged(weight: Tensor, low_rank: LowRank) -> Tensor:
    return weight + low_rank.scale * low_rank.up @ low_rank.down


def copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()


@pytest.mark.parametrize("biased", [False, True])
def test_linear_equals_torch(biased: bool) -> None:
    x, weight, bias = random(5, 2, HIDDEN), random(WIDTH, HIDDEN).detach(), random(WIDTH).detach() if biased else None
    own = adapter(WIDTH, HIDDEN, 0.7)
    output = adapted_linear(x, weight, bias, own)
    output.square().sum().backward()
    again, exact = copied(x), LowRank(copied(own.down), copied(own.up), 0.7)
    expected = F.linear(again, merged(weight, exact), bias)
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    for one, other in ((x, again), (own.down, exact.down), (own.up, exact.up)):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_mlp_equals_torch(gate: Gate) -> None:
    x, up, down = random(5, 2, HIDDEN), random(2 * WIDTH, HIDDEN).detach(), random(HIDDEN, WIDTH).detach()
    own = adapter(2 * WIDTH, HIDDEN, 0.7), adapter(HIDDEN, WIDTH, 1.3)
    output = adapted_gated_mlp(x, up, down, *own, gate)
    output.square().sum().backward()
    again, exact = copied(x), [LowRank(copied(each.down), copied(each.up), each.scale) for each in own]
    values, linear = F.linear(again, merged(up, exact[0])).chunk(2, dim=-1)
    activated = F.silu(values) if gate == "silu" else F.gelu(values, approximate="tanh")
    expected = F.linear(activated * linear, merged(down, exact[1]))
    expected.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, again.grad)
    for one, other in zip(own, exact, strict=True):
        torch.testing.assert_close(one.down.grad, other.down.grad)
        torch.testing.assert_close(one.up.grad, other.up.grad)


def test_fp8_rounds_the_frozen_product_alone() -> None:
    x, weight = random(7, HIDDEN, dtype=torch.float32), random(WIDTH, HIDDEN, dtype=torch.float32).detach()
    own = adapter(WIDTH, HIDDEN, 0.7, torch.float32)
    grad = random(7, WIDTH, dtype=torch.float32).detach()
    output = adapted_linear(x, weight, None, own, fp8_gradients="e4m3")
    output.backward(grad)
    low, there, back = (fp8.quantize(each) for each in (x.detach(), weight, grad))
    with torch.no_grad():
        frozen = fp8.product(low, there, torch.float32)
        torch.testing.assert_close(output, frozen + 0.7 * (x @ own.down.t()) @ own.up.t())
        rounded = fp8.product(back, fp8.quantize_transposed(weight), torch.float32)
        torch.testing.assert_close(x.grad, rounded + 0.7 * (grad @ own.up) @ own.down)
        torch.testing.assert_close(own.down.grad, 0.7 * (grad @ own.up).t() @ x)
        torch.testing.assert_close(own.up.grad, 0.7 * grad.t() @ (x @ own.down.t()))


@pytest.mark.parametrize("forms", [("e4m3", "e4m3"), ("e5m2", "bf16"), ("bf16", "e4m3")])
def test_mlp_over_fp8_is_the_frozen_one_where_the_adapters_are_zero(forms: tuple[GradientForm, GradientForm]) -> None:
    x = random(7, HIDDEN, dtype=torch.float32)
    up, down = (random(*shape, dtype=torch.float32).detach() for shape in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    zeros = [
        LowRank(torch.zeros(RANK, columns), torch.zeros(rows, RANK), 1.0)
        for rows, columns in ((2 * WIDTH, HIDDEN), (HIDDEN, WIDTH))
    ]
    again = copied(x)
    output = adapted_gated_mlp(x, up, down, *zeros, fp8_gradients=forms)
    expected = gated_mlp(again, up, down, fp8_gradients=forms)
    for result in (output, expected):
        result.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(x.grad, again.grad)
