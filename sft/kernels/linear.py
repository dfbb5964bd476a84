"""Linear layers and the gated MLP as single operations, in the input's precision or with products in fp8.

In fp8, forward and the gradient of the input are fp8 products (sft.kernels.fp8). The gradient of a weight is not: it
is a sum over tokens whose rounding errors would stay in the weights, so it is computed from the unrounded factors.

The MLP saves its input and the projection [gate; up] for backward, but not activation(gate) * up: the backward kernel
reads both halves anyway and writes the product again. That saves a fifth of a layer's activations for one write.

Nothing here communicates: with tensor parallelism the caller gathers inputs before and reduces outputs after.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.autograd import Context
from sft.kernels.gated import Gate, activate
from sft.kernels.weight_gradient import weight_gradient


def fp8_linear(x: Tensor | fp8.WithRows, weight: Tensor) -> Tensor:
    """Return x @ weight^T in fp8, [..., rows], of x [..., columns] and weight [rows, columns]."""
    output: Tensor = _Fp8Linear.apply(fp8.unquantized(x), fp8.rows_of(x), weight)
    return output


def gated_mlp(
    x: Tensor | fp8.WithRows, up: Tensor, down: Tensor, gate: Gate = "silu", *, in_fp8: bool = False
) -> Tensor:
    """Return (activation(g) * u) @ down^T, [..., hidden], where [g, u] = x @ up^T.

    x is [..., hidden], up [2 * width, hidden] with the gate's rows first, down [hidden, width].
    """
    output: Tensor = _GatedMLP.apply(fp8.unquantized(x), fp8.rows_of(x) if in_fp8 else None, up, down, gate)
    return output


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor, low: fp8.Rows, weight: Tensor) -> Tensor:
        ctx.save_for_backward(as_rows(x), weight)
        output = fp8.product(low, fp8.quantize(weight), x.dtype)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        own = as_rows(grad)
        x_grad = weight_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = fp8.product(fp8.quantize(own), fp8.quantize_transposed(weight), grad.dtype)
            x_grad = x_grad.view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[2]:
            weight_grad = weight_gradient(weight, own, rows)
        return x_grad, None, weight_grad


class _MLPContext(Context, Protocol):
    in_fp8: bool
    gate: Gate


class _GatedMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _MLPContext, x: Tensor, low: fp8.Rows | None, up: Tensor, down: Tensor, gate: Gate) -> Tensor:
        rows = as_rows(x)
        if low is not None:
            mixed = fp8.product(low, fp8.quantize(up), x.dtype)
            output = fp8.product(_gated_rows(mixed, gate), fp8.quantize(down), x.dtype)
        else:
            mixed = rows @ up.t()
            output = gated_product(mixed, gate) @ down.t()
        ctx.save_for_backward(rows, mixed, up, down)
        ctx.in_fp8, ctx.gate = low is not None, gate
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mixed, up, down = ctx.saved_tensors
        own = as_rows(grad)
        if ctx.in_fp8:
            gated_grad = fp8.product(fp8.quantize(own), fp8.quantize_transposed(down), grad.dtype)
        else:
            gated_grad = own @ down
        gated, mixed_grad, low = gated_gradient(gated_grad, mixed, ctx.gate, quantize=ctx.in_fp8)
        del gated_grad  # these are the largest tensors of a layer: each is freed before the next is made
        down_grad = weight_gradient(down, own, gated) if ctx.needs_input_grad[3] else None
        del gated
        x_grad = mixed_grad @ up if low is None else fp8.product(low, fp8.quantize_transposed(up), grad.dtype)
        up_grad = weight_gradient(up, mixed_grad, rows) if ctx.needs_input_grad[2] else None
        return x_grad.view(*grad.shape[:-1], -1), None, up_grad, down_grad, None


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
    grad: Tensor, mixed: Tensor, gate: Gate, *, quantize: bool
) -> tuple[Tensor, Tensor, fp8.Rows | None]:
    """Return activation(gate) * up, the gradient of `mixed`, and that gradient in fp8 (None unless `quantize` is set).

    On a GPU the gradient is written over `mixed`.
    """
    if mixed.is_cuda:
        from sft.kernels.triton import fp8 as triton_fp8

        gated, low = triton_fp8.gated_backward(grad, mixed, gate, quantize=quantize)
        return gated, mixed, None if low is None else fp8.Rows(*low)
    with torch.enable_grad():
        mixed = mixed.detach().requires_grad_()
        product = gated_product(mixed, gate)
    (own,) = torch.autograd.grad(product, mixed, grad)
    return product.detach(), own, fp8.quantize(own) if quantize else None
