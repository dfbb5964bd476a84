"""Frozen linears with low-rank adapters, and a frozen gated MLP with them, as single operations.

Between an adapter's two matrices there are only `rank` numbers a token, so its arithmetic is nothing beside the frozen
product's; what it costs is memory traffic. Added by the product itself (beta = 1 of a GEMM) to the output, and in the
backward pass to the gradient of the input, it takes one pass over each. As operations of their own, adapter and
addition take four.

Nothing here communicates: with tensor parallelism ranks exchange what is between the two matrices
(sft.megatron.layers.lora), and the adapter is an operation of its own.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sft.kernels import fp8
from sft.kernels.autograd import Context
from sft.kernels.gated import Gate
from sft.kernels.linear import GradientForm, as_rows, forward_product, gated_gradient, gated_product, input_gradient


class LowRank(NamedTuple):
    """What an adapter adds to a linear's weight: scale * up @ down."""

    down: Tensor
    """[rank, columns]."""
    up: Tensor
    """[rows, rank]."""
    scale: float


def adapted_linear(
    x: Tensor | fp8.WithRows,
    weight: Tensor,
    bias: Tensor | None,
    adapter: LowRank,
    *,
    fp8_gradients: GradientForm | None = None,
) -> Tensor:
    """Return x @ (weight + adapter)^T + bias, [..., rows], of x [..., columns].

    Weight and bias get no gradient. With `fp8_gradients`, the form of gradients, the frozen product is one of fp8.
    """
    low = None if fp8_gradients is None else fp8.rows_of(x)
    output: Tensor = _AdaptedLinear.apply(fp8.unquantized(x), low, weight, bias, *adapter, fp8_gradients or "bf16")
    return output


def adapted_gated_mlp(
    x: Tensor | fp8.WithRows,
    up: Tensor,
    down: Tensor,
    of_up: LowRank,
    of_down: LowRank,
    gate: Gate = "silu",
    *,
    fp8_gradients: tuple[GradientForm, ...] | None = None,
) -> Tensor:
    """Return `sft.kernels.linear.gated_mlp` with an adapter on each of its two weights, which get no gradient."""
    low = None if fp8_gradients is None else fp8.rows_of(x)
    forms = fp8_gradients or ("bf16", "bf16")
    output: Tensor = _AdaptedMLP.apply(fp8.unquantized(x), low, up, down, *of_up, *of_down, gate, forms)
    return output


class _LinearContext(Context, Protocol):
    scale: float
    gradients: GradientForm


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _LinearContext, x: Tensor, low: fp8.Rows | None, weight: Tensor, bias: Tensor | None,
        down: Tensor, up: Tensor, scale: float, gradients: GradientForm,
    ) -> Tensor:  # fmt: skip
        rows = as_rows(x)
        output = forward_product(rows, low, weight)
        if bias is not None:
            output += bias
        hidden = _add_adapter(output, rows, down, up, scale)
        ctx.save_for_backward(rows, hidden, weight, down, up)
        ctx.scale, ctx.gradients = scale, gradients
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _LinearContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, weight, down, up = ctx.saved_tensors
        own = as_rows(grad)
        hidden_grad, up_grad = _hidden_gradient(own, hidden, up, ctx.scale)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = input_gradient(own, weight, ctx.gradients).addmm_(hidden_grad, down)
            x_grad = x_grad.view(*grad.shape[:-1], -1)
        return x_grad, None, None, None, hidden_grad.t() @ rows, up_grad, None, None


class _MLPContext(Context, Protocol):
    scales: tuple[float, float]
    gate: Gate
    gradients: tuple[GradientForm, GradientForm]
    """For `up` and for `down`."""


class _AdaptedMLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _MLPContext, x: Tensor, low: fp8.Rows | None, up: Tensor, down: Tensor,
        up_a: Tensor, up_b: Tensor, up_scale: float, down_a: Tensor, down_b: Tensor, down_scale: float, gate: Gate,
        gradients: tuple[GradientForm, GradientForm],
    ) -> Tensor:  # fmt: skip
        rows = as_rows(x)
        mixed = forward_product(rows, low, up)
        up_hidden = _add_adapter(mixed, rows, up_a, up_b, up_scale)
        product = gated_product(mixed, gate)
        output = forward_product(product, None if low is None else fp8.quantize(product), down)
        down_hidden = _add_adapter(output, product, down_a, down_b, down_scale)
        # Backward writes `product` again, as without adapters: it is a fifth of what a layer keeps.
        ctx.save_for_backward(rows, mixed, up_hidden, down_hidden, up, down, up_a, up_b, down_a, down_b)
        ctx.scales, ctx.gate, ctx.gradients = (up_scale, down_scale), gate, gradients
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _MLPContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, mixed, up_hidden, down_hidden, up, down, up_a, up_b, down_a, down_b = ctx.saved_tensors
        own = as_rows(grad)
        hidden_grad, down_b_grad = _hidden_gradient(own, down_hidden, down_b, ctx.scales[1])
        form, of_down = ctx.gradients
        product_grad = input_gradient(own, down, of_down).addmm_(hidden_grad, down_a)
        product, mixed_grad, low = gated_gradient(product_grad, mixed, ctx.gate, None if form == "bf16" else form)
        del product_grad  # these are the largest tensors of a layer: each is freed before the next is made
        down_a_grad = hidden_grad.t() @ product
        del product
        hidden_grad, up_b_grad = _hidden_gradient(mixed_grad, up_hidden, up_b, ctx.scales[0])
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = input_gradient(mixed_grad, up, form, low).addmm_(hidden_grad, up_a)
            x_grad = x_grad.view(*grad.shape[:-1], -1)
        up_a_grad = hidden_grad.t() @ rows
        return x_grad, None, None, None, up_a_grad, up_b_grad, None, down_a_grad, down_b_grad, None, None, None


def _add_adapter(output: Tensor, rows: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add what the adapter makes of `rows` to `output`, and return what is between its two matrices, [tokens, rank]."""
    hidden = (rows @ down.t()).mul_(scale)
    output.addmm_(hidden, up.t())
    return hidden


def _hidden_gradient(grad: Tensor, hidden: Tensor, up: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of rows @ down^T and of `up`, from that of the output, `grad` [tokens, rows of up]."""
    return (grad @ up).mul_(scale), grad.t() @ hidden
