"""Linears and the MLP as single operations on a CPU: against torch in fp64, and fp8 against rounding by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.gated import Gate
from sft.kernels.linear import GradientForm, fp8_linear, gated_mlp
from sft.kernels.weight_gradient import weight_gradient

HIDDEN, WIDTH = 16, 48


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype).requires_grad_()


def plain(x: Tensor, up: Tensor, down: Tensor, gate: Gate) -> Tensor:
    values, linear = (x @ up.t()).chunk(2, dim=-1)
    return ((F.silu(values) if gate == "silu" else F.gelu(values, approximate="tanh")) * linear) @ down.t()


@pytest.mark.parametrize("gate", ["silu", "gelu_tanh"])
def test_mlp_equals_torch(gate: Gate) -> None:
    own = [random(5, 2, HIDDEN), random(2 * WIDTH, HIDDEN), random(HIDDEN, WIDTH)]
    exact = [tensor.detach().clone().requires_grad_() for tensor in own]
    results = [operation(*tensors, gate) for operation, tensors in ((gated_mlp, own), (plain, exact))]
    for result in results:
        result.square().sum().backward()
    torch.testing.assert_close(results[0], results[1])
    for one, other in zip(own, exact, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_frozen_weights_have_no_gradient() -> None:
    x, up, down = random(5, HIDDEN), random(2 * WIDTH, HIDDEN).detach(), random(HIDDEN, WIDTH).detach()
    gated_mlp(x, up, down).sum().backward()
    fp8_linear(x, up).sum().backward()
    assert x.grad is not None and up.grad is None and down.grad is None


LARGEST = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}


def rounded(x: Tensor, rows: bool, dtype: torch.dtype = torch.float8_e4m3fn) -> Tensor:
    """Return the matrix rounded to fp8 with a scale for each row, or column, that maps its largest to that of fp8."""
    scale = x.detach().float().abs().amax(dim=1 if rows else 0, keepdim=True).clamp(min=1e-12) / LARGEST[dtype]
    return (x.detach().float() / scale).to(dtype).float() * scale


def test_fp8_rounds_tokens_and_channels_and_not_weight_gradients() -> None:
    x, weight = random(7, HIDDEN, dtype=torch.float32), random(WIDTH, HIDDEN, dtype=torch.float32)
    grad = random(7, WIDTH, dtype=torch.float32).detach()
    output = fp8_linear(x, weight)
    output.backward(grad)
    torch.testing.assert_close(output, rounded(x, True) @ rounded(weight, True).t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad, rounded(grad, True) @ rounded(weight, False), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, grad.t() @ x.detach())


def gradients(form: GradientForm, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of the input by a linear in fp8, and the weight, a random matrix that goes with `grad`."""
    x, weight = random(7, HIDDEN, dtype=torch.float32), random(WIDTH, HIDDEN, dtype=torch.float32)
    fp8_linear(x, weight, form).backward(grad)
    assert x.grad is not None
    return x.grad, weight.detach()


def test_gradients_in_e5m2_and_bf16() -> None:
    grad = random(7, WIDTH, dtype=torch.float32).detach()
    found, weight = gradients("e5m2", grad)
    torch.testing.assert_close(
        found, rounded(grad, True, torch.float8_e5m2) @ rounded(weight, False), rtol=1e-5, atol=1e-5
    )
    found, weight = gradients("bf16", grad)
    torch.testing.assert_close(found, grad @ weight)


def test_what_e5m2_keeps_beside_a_large_value() -> None:
    """A value that is 2**-20 of the largest of its token is lost in E4M3."""
    grad = torch.zeros(7, WIDTH)
    grad[:, 0], grad[:, 1] = 1.0, 2.0**-20
    weight = torch.zeros(WIDTH, HIDDEN)
    weight[1, 0] = 1.0
    kept = {}
    for form in ("e4m3", "e5m2"):
        x = torch.zeros(7, HIDDEN, requires_grad=True)
        fp8_linear(x, weight, form).backward(grad)
        assert x.grad is not None
        kept[form] = float(x.grad[0, 0])
    assert kept == {"e4m3": 0.0, "e5m2": pytest.approx(2.0**-20, rel=0.13)}


@pytest.mark.parametrize("forms", [("bf16", "bf16"), ("e4m3", "bf16"), ("bf16", "e5m2")])
def test_each_product_of_an_mlp_has_gradients_of_its_own(forms: tuple[GradientForm, GradientForm]) -> None:
    """The definition, written out: forward in fp8, and each gradient of an input as its form says."""
    x, up, down = (random(*shape, dtype=torch.float32) for shape in ((7, HIDDEN), (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)))
    grad = random(7, HIDDEN, dtype=torch.float32).detach()
    gated_mlp(x, up, down, fp8_gradients=forms).backward(grad)
    mixed = (rounded(x, True) @ rounded(up, True).t()).requires_grad_()
    values, linear = mixed.chunk(2, dim=-1)
    inner = input_gradient(grad, down.detach(), forms[1])
    (outer,) = torch.autograd.grad(F.silu(values) * linear, mixed, inner)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, input_gradient(outer, up.detach(), forms[0]), rtol=1e-5, atol=1e-5)


def input_gradient(grad: Tensor, weight: Tensor, form: GradientForm) -> Tensor:
    if form == "bf16":
        return grad @ weight
    return rounded(grad, True, fp8.DTYPES[form]) @ rounded(weight, False)


@pytest.mark.parametrize("value", [0.0, 1e-30, 3e4])
def test_rows_of_any_size(value: float) -> None:
    """Zeros stay zeros, the largest value stays what it is, and no row affects another."""
    x = torch.ones(2, HIDDEN)
    x[1] = value
    found = fp8.quantize(x)
    torch.testing.assert_close(found.values.float() * found.scales, x, rtol=1e-6, atol=1e-12)


def test_weight_gradients_of_a_step_are_added_up() -> None:
    """The first product overwrites the buffer, which is zeroed in training. The flag says which is the first."""
    weight, inputs, grad = random(WIDTH, HIDDEN), random(7, HIDDEN).detach(), random(7, WIDTH).detach()
    weight.main_grad, weight.grad_added_to_main_grad = torch.full((WIDTH, HIDDEN), 9.0), False  # type: ignore[attr-defined]
    for _ in range(2):
        assert weight_gradient(weight, grad, inputs).shape == weight.shape
    torch.testing.assert_close(weight.main_grad, (2 * grad.t() @ inputs).float())  # type: ignore[attr-defined]
