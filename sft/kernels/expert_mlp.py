"""The SwiGLU MLPs of all experts as one operation, which keeps little for its backward pass.

The weight of a row multiplies silu(gate) * up, before the second product: that equals weighting the output, and its
gradient is a sum over what the backward pass computes anyway, so that outputs need not be kept. Kept are the rows and
the projection [gate; up]; silu(gate) * up is computed again by the kernel that reads both halves.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.fp8_experts import Forms, forward_products, input_gradients
from sft.kernels.grouped_experts import expert_weight_gradients, wide


def swiglu_experts(
    rows: Tensor, weights: Tensor, up: Tensor, down: Tensor, ends: Tensor, *, fp8_gradients: Forms | None = None
) -> Tensor:
    """Return weights * ((silu(g) * u) @ down^T), [rows, hidden], where [g, u] = rows @ up^T with each row's expert.

    rows are [rows, hidden], sorted by expert, their weights fp32 [rows]. up is [experts * 2 * width, hidden] with an
    expert's gate above its up projection, down [experts * hidden, width]. `ends` int32 [experts] holds for each expert
    the row behind its last one. With `fp8_gradients`, the forms of gradients for `up` and `down`, the products are in
    fp8.
    """
    output: Tensor = _SwiGLUExperts.apply(rows, weights, up, down, ends, fp8_gradients)
    return output


def weighted_swiglu(mixed: Tensor, weights: Tensor) -> Tensor:
    """Return weights * silu(g) * u, [rows, width], of mixed = [g, u] and fp32 weights [rows].

    On a GPU backward writes the gradient over `mixed`: no other operation may need it in its own backward.
    """
    gated: Tensor = _WeightedSwiGLU.apply(mixed, weights)
    return gated


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, mixed: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(mixed, weights)
        return _weighted(mixed, weights)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, Tensor]:
        mixed, weights = ctx.saved_tensors
        _, mixed_grad, weights_grad = _weighted_backward(grads[0].contiguous(), mixed, weights)
        return mixed_grad, weights_grad


class _FormsContext(Context, Protocol):
    gradients: Forms


class _SwiGLUExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _FormsContext,
        rows: Tensor,
        weights: Tensor,
        up: Tensor,
        down: Tensor,
        ends: Tensor,
        fp8_gradients: Forms | None,
    ) -> Tensor:
        in_fp8 = fp8_gradients is not None
        ctx.gradients = fp8_gradients or ("bf16", "bf16")
        mixed = forward_products(rows, up, ends, in_fp8=in_fp8)
        ctx.save_for_backward(rows, weights, mixed, up, down, ends)
        return forward_products(_weighted(mixed, weights), down, ends, in_fp8=in_fp8)

    @staticmethod
    def backward(ctx: _FormsContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, weights, mixed, up, down, ends = ctx.saved_tensors
        grad, count = grads[0].contiguous(), len(ends)
        of_up, of_down = ctx.gradients
        gated_grad = input_gradients(grad, down, ends, of_down)
        gated, mixed_grad, weights_grad = _weighted_backward(gated_grad, mixed, weights)
        del gated_grad  # these are the largest tensors of a layer: each is freed before the next is made
        down_grad = expert_weight_gradients(down, count, grad, gated, ends) if ctx.needs_input_grad[3] else None
        del gated
        rows_grad = input_gradients(mixed_grad, up, ends, of_up)
        up_grad = expert_weight_gradients(up, count, mixed_grad, rows, ends) if ctx.needs_input_grad[2] else None
        return rows_grad, weights_grad, up_grad, down_grad, None, None


def _weighted(mixed: Tensor, weights: Tensor) -> Tensor:
    """Return weights * silu(gate) * up, [rows, width]."""
    if mixed.is_cuda:
        from sft.kernels.triton import experts as triton_experts  # installed with CUDA builds of torch only

        return triton_experts.weighted_swiglu(mixed, weights)
    gate, up = wide(mixed).chunk(2, dim=-1)
    return (F.silu(gate) * up * weights.unsqueeze(-1)).to(mixed.dtype)


def _weighted_backward(grad: Tensor, mixed: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights * silu(gate) * up, the gradient of `mixed`, and that of the weights.

    On a GPU the gradient is written over `mixed`.
    """
    if mixed.is_cuda:
        from sft.kernels.triton import experts as triton_experts

        return triton_experts.weighted_swiglu_backward(grad, mixed, weights)
    gate, up = wide(mixed).chunk(2, dim=-1)
    sigmoid, silu, column = torch.sigmoid(gate), F.silu(gate), weights.unsqueeze(-1)
    own = wide(grad) * column
    # silu(g) = g * sigmoid(g), so silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g)).
    gate_grad = own * up * (sigmoid + silu * (1 - sigmoid))
    mixed_grad = torch.cat([gate_grad, own * silu], dim=-1).to(mixed.dtype)
    weights_grad = (wide(grad) * silu * up).sum(-1)
    return (silu * up * column).to(mixed.dtype), mixed_grad, weights_grad
