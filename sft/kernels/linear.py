"""Linear layers and the gated MLP as single operations, in the input's precision or with products in fp8.

In fp8, forward and the gradient of the input are fp8 products (sft.kernels.fp8). The gradient of a weight is not: it
is a sum over tokens whose rounding errors would stay in the weights, so it is computed from the unrounded factors. The
gradient of the input may be computed in the input's precision as well.

The MLP saves its input and the projection [gate; up] for backward, but not activation(gate) * up: the backward kernel
reads both halves anyway and writes the product again. That saves a fifth of a layer's activations for one write.

Nothing here communicates: with tensor parallelism the caller gathers inputs before and reduces outputs after.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.autograd import Context
from sft.kernels.gated import Gate, activate
from sft.kernels.weight_gradient import weight_gradient

GradientForm = Literal[fp8.Format, "bf16"]
"""How the gradient of an output enters the product that makes the gradient of the input: rounded to fp8 together with
the weight, or both as they are."""


def fp8_linear(x: Tensor | fp8.WithRows, weight: Tensor, gradients: GradientForm = "e4m3") -> Tensor:
    """Return x @ weight^T in fp8, [..., rows], of x [..., columns] and weight [rows, columns]."""
    output: Tensor = _Fp8Linear.apply(fp8.unquantized(x), fp8.rows_of(x), weight, gradients)
    return output


def gated_mlp(
    x: Tensor | fp8.WithRows,
    up: Tensor,
    down: Tensor,
    gate: Gate = "silu",
    *,
    fp8_gradients: tuple[GradientForm, ...] | None = None,
) -> Tensor:
    """Return (activation(g) * u) @ down^T, [..., hidden], where [g, u] = x @ up^T.

    x is [..., hidden], up [2 * width, hidden] with the gate's rows first, down [hidden, width]. With `fp8_gradients`,
    the forms of gradients for `up` and `down`, the products are in fp8.
    """
    low = None if fp8_gradients is None else fp8.rows_of(x)
    output: Tensor = _GatedMLP.apply(fp8.unquantized(x), low, up, down, gate, fp8_gradients or ("bf16", "bf16"))
    return output


class _Fp8Context(Context, Protocol):
    gradients: GradientForm


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _Fp8Context, x: Tensor, low: fp8.Rows, weight: Tensor, gradients: GradientForm) -> Tensor:
        rows = as_rows(x)
        ctx.save_for_backward(rows, weight)
        ctx.gradients = gradients
        return forward_product(rows, low, weight).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _Fp8Context, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        own = as_rows(grad)
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = input_gradient(own, weight, ctx.gradients).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[2]:
            weight_grad = weight_gradient(weight, own, rows)
        return x_grad, None, weight_grad, None


class _MLPContext(Context, Protocol):
    gate: Gate
    gradients: tuple[GradientForm, GradientForm]
    """For `up` and for `down`."""


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _MLPContext,
        x: Tensor,
        low: fp8.Rows | None,
        up: Tensor,
        down: Tensor,
        gate: Gate,
        gradients: tuple[GradientForm, GradientForm],
    ) -> Tensor:
        rows = as_rows(x)
        mixed = forward_product(rows, low, up)
        if low is not None:
            output = fp8.product(_gated_rows(mixed, gate), fp8.quantize(down), x.dtype)
        else:
            output = gated_product(mixed, gate) @ down.t()
        ctx.save_for_backward(rows, mixed, up, down)
        ctx.gate, ctx.gradients = gate, gradients
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mixed, up, down = ctx.saved_tensors
        own = as_rows(grad)
        of_up, of_down = ctx.gradients
        gated_grad = input_gradient(own, down, of_down)
        gated, mixed_grad, low = gated_gradient(gated_grad, mixed, ctx.gate, None if of_up == "bf16" else of_up)
        del gated_grad  # these are the largest tensors of a layer: each is freed before the next is made
        down_grad = weight_gradient(down, own, gated) if ctx.needs_input_grad[3] else None
        del gated
        x_grad = input_gradient(mixed_grad, up, of_up, low)
        up_grad = weight_gradient(up, mixed_grad, rows) if ctx.needs_input_grad[2] else None
        return x_grad.view(*grad.shape[:-1], -1), None, up_grad, down_grad, None, None


def forward_product(rows: Tensor, low: fp8.Rows | None, weight: Tensor) -> Tensor:
    """Return rows @ weight^T, [tokens, out], in fp8 where `low` is `rows` in it."""
    return rows @ weight.t() if low is None else fp8.product(low, fp8.quantize(weight), rows.dtype)


def input_gradient(grad: Tensor, weight: Tensor, form: GradientForm, low: fp8.Rows | None = None) -> Tensor:
    """Return grad @ weight, [tokens, in], of contiguous grad [tokens, out] and weight [out, in].

    `low` is `grad` in fp8 of that form, where the caller has it.
    """
    if form == "bf16":
        return grad @ weight
    return fp8.product(low or fp8.quantize(grad, form), fp8.quantize_transposed(weight), grad.dtype)


def as_rows(x: Tensor) -> Tensor:
    """Return [..., columns] as a contiguous matrix [rows, columns]."""
    return x.contiguous().view(-1, x.shape[-1])


def gated_product(mixed: Tensor, gate: Gate) -> Tensor:
    """Return activation(gate) * up, of `mixed` = [gate, up]."""
    if mixed.is_cuda:
        from sft.kernels.triton import gated as triton_gated  # installed with CUDA builds of torch only

        return triton_gated.forward(mixed, gate)
    values, up = mixed.chunk(2, dim=-1)
    return activate(values, gate) * up


def _gated_rows(mixed: Tensor, gate: Gate) -> fp8.Rows:
    if mixed.is_cuda:
        from sft.kernels.triton import fp8 as triton_fp8

        return fp8.Rows(*triton_fp8.gated(mixed, gate))
    return fp8.quantize(gated_product(mixed, gate))


def gated_gradient(
    grad: Tensor, mixed: Tensor, gate: Gate, form: fp8.Format | None
) -> tuple[Tensor, Tensor, fp8.Rows | None]:
    """Return activation(gate) * up, the gradient of `mixed`, and that gradient in fp8 of a form (None for None).

    On a GPU the gradient is written over `mixed`.
    """
    if mixed.is_cuda:
        from sft.kernels.triton import fp8 as triton_fp8

        quantized = None if form is None else (fp8.DTYPES[form], fp8.LARGEST[form])
        gated, low = triton_fp8.gated_backward(grad, mixed, gate, quantized)
        return gated, mixed, None if low is None else fp8.Rows(*low)
    with torch.enable_grad():
        mixed = mixed.detach().requires_grad_()
        product = gated_product(mixed, gate)
    (own,) = torch.autograd.grad(product, mixed, grad)
    return product.detach(), own, None if form is None else fp8.quantize(own, form)
