"""Experts with biases and a clamped unit (gpt-oss), as one operation that keeps little for its backward pass.

As in sft.kernels.expert_mlp the weight of a row multiplies the unit, before the second product. The second bias is
multiplied by it on its own. Kept are the rows and the first projection; the unit is computed again.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.expert_bias import by_row, sums_by_expert
from sft.kernels.fp8_experts import Forms, forward_products, input_gradients
from sft.kernels.grouped_experts import expert_weight_gradients, wide

Unit = tuple[float, float]
"""Slope and limit of the unit (up + 1) * gate * sigmoid(slope * gate): the gate is at most the limit before, the up
projection between -limit and limit."""


def clamped_unit(mixed: Tensor, unit: Unit) -> Tensor:
    """Return the unit, [rows, width], of mixed = [gate, up], by torch's own operations."""
    slope, _ = unit
    gate, up = _clamped(mixed, unit)
    return (up + 1) * (gate * torch.sigmoid(slope * gate))


def clamped_experts(
    rows: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor],
    down: tuple[Tensor, Tensor],
    ends: Tensor,
    unit: Unit,
    *,
    adds_bias: bool = True,
    fp8_gradients: Forms | None = None,
) -> Tensor:
    """Return weights * (unit(rows @ up^T + its bias) @ down^T + its bias), [rows, hidden], with each row's expert.

    rows are [rows, hidden], sorted by expert, their weights fp32 [rows]. `up` are matrices [experts * 2 * width,
    hidden] with an expert's gate above its up projection, and their biases; `down` matrices [experts * hidden, width]
    and theirs. `ends` int32 [experts] holds for each expert the row behind its last one. A rank that does not say
    `adds_bias` leaves the second bias out: the result is a part of a sum, of which another rank adds it
    (sft.kernels.expert_bias). With `fp8_gradients`, the forms of gradients for `up` and `down`, the products are in
    fp8.
    """
    output: Tensor = _ClampedExperts.apply(rows, weights, *up, *down, ends, unit, adds_bias, fp8_gradients)
    return output


class _Saved(Context, Protocol):
    unit: Unit
    adds_bias: bool
    gradients: Forms


class _ClampedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Saved, rows: Tensor, weights: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor,
        ends: Tensor, unit: Unit, adds_bias: bool, fp8_gradients: Forms | None,
    ) -> Tensor:  # fmt: skip
        ctx.unit, ctx.adds_bias, count, in_fp8 = unit, adds_bias, len(ends), fp8_gradients is not None
        ctx.gradients = fp8_gradients or ("bf16", "bf16")
        mixed = forward_products(rows, up, ends, in_fp8=in_fp8)
        # In place: the product is this function's own, and as large as anything in the layer.
        mixed += by_row(up_bias.view(count, -1), len(rows), ends)
        ctx.save_for_backward(rows, weights, mixed, up, up_bias, down, down_bias, ends)
        output = forward_products(_weighted(mixed, weights, unit), down, ends, in_fp8=in_fp8)
        if adds_bias:
            output += (by_row(down_bias.view(count, -1), len(rows), ends) * weights.unsqueeze(-1)).to(output.dtype)
        return output

    @staticmethod
    def backward(ctx: _Saved, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, mixed, up, up_bias, down, down_bias, ends = ctx.saved_tensors
        _, _, wants_up, wants_up_bias, wants_down, wants_down_bias, *_ = ctx.needs_input_grad
        grad, count = grads[0].contiguous(), len(ends)
        of_up, of_down = ctx.gradients
        gated_grad = input_gradients(grad, down, ends, of_down)
        gated, mixed_grad, weights_grad = _weighted_backward(gated_grad, mixed, weights, ctx.unit)
        del gated_grad  # these are the largest tensors of a layer: each is freed before the next is made
        if ctx.adds_bias:
            # The output is weights * (unit @ down^T + bias); of the first term the kernel has made the gradient.
            weights_grad += (wide(grad) * by_row(down_bias.view(count, -1), len(rows), ends)).sum(-1)
        down_grad = expert_weight_gradients(down, count, grad, gated, ends) if wants_down else None
        del gated
        # Whole on every rank, also on one that adds no bias: the gradient of the sum is that of each of its parts.
        own_down = sums_by_expert(grad, ends, weights).to(down_bias.dtype).flatten() if wants_down_bias else None
        rows_grad = input_gradients(mixed_grad, up, ends, of_up)
        up_grad = expert_weight_gradients(up, count, mixed_grad, rows, ends) if wants_up else None
        own_up = sums_by_expert(mixed_grad, ends).to(up_bias.dtype).flatten() if wants_up_bias else None
        return rows_grad, weights_grad, up_grad, own_up, down_grad, own_down, None, None, None, None


def _weighted(mixed: Tensor, weights: Tensor, unit: Unit) -> Tensor:
    """Return the unit times the weights, [rows, width]."""
    if mixed.is_cuda:
        from sft.kernels.triton import clamped_unit as triton_unit  # installed with CUDA builds of torch only

        return triton_unit.weighted(mixed, weights, *unit)
    return (clamped_unit(wide(mixed), unit) * weights.unsqueeze(-1)).to(mixed.dtype)


def _weighted_backward(grad: Tensor, mixed: Tensor, weights: Tensor, unit: Unit) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unit times the weights, the gradient of `mixed`, and that of the weights.

    On a GPU the gradient is written over `mixed`.
    """
    if mixed.is_cuda:
        from sft.kernels.triton import clamped_unit as triton_unit

        return triton_unit.weighted_backward(grad, mixed, weights, *unit)
    slope, limit = unit
    (raw_gate, raw_up), (gate, up) = wide(mixed).chunk(2, dim=-1), _clamped(wide(mixed), unit)
    sigmoid, column = torch.sigmoid(slope * gate), weights.unsqueeze(-1)
    # With t(g) = g * sigmoid(a g), t'(g) = sigmoid(a g) + a t(g) * (1 - sigmoid(a g)). What is beyond the limit passes
    # no gradient on, and what is at it does, as with torch's clamp.
    swish, own = gate * sigmoid, wide(grad) * column
    gate_grad = own * (up + 1) * (sigmoid + slope * swish * (1 - sigmoid)) * (raw_gate <= limit)
    up_grad = own * swish * (raw_up.abs() <= limit)
    gated = (up + 1) * swish
    weights_grad = (wide(grad) * gated).sum(-1)
    return (gated * column).to(mixed.dtype), torch.cat([gate_grad, up_grad], dim=-1).to(mixed.dtype), weights_grad


def _clamped(mixed: Tensor, unit: Unit) -> tuple[Tensor, Tensor]:
    """Return gate and up projection within the limit."""
    gate, up = mixed.chunk(2, dim=-1)
    _, limit = unit
    return gate.clamp(max=limit), up.clamp(-limit, limit)
