"""The clamped unit of experts in Triton: one pass forward, one backward, both times the weights of rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


@triton.jit
def _weighted(x_ptr, weights_ptr, y_ptr, width, slope, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit)
    up = tl.maximum(tl.minimum(up, limit), -limit)
    y = (up + 1) * gate * tl.sigmoid(slope * gate) * tl.load(weights_ptr + row)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, weights_ptr, y_ptr, weights_grad_ptr, width, slope, limit, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        raw_gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        raw_up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.minimum(raw_gate, limit)
        up = tl.maximum(tl.minimum(raw_up, limit), -limit)
        sigmoid = tl.sigmoid(slope * gate)
        swish = gate * sigmoid
        gated = (up + 1) * swish
        total += grad * gated
        own = grad * weight
        # Of t(g) = g * sigmoid(a g) the derivative is sigmoid + a * t * (1 - sigmoid). What is clamped passes no
        # gradient on, and a value at the limit does.
        gate_grad = tl.where(raw_gate <= limit, own * (up + 1) * (sigmoid + slope * swish * (1 - sigmoid)), 0.0)
        up_grad = tl.where(tl.abs(raw_up) <= limit, own * swish, 0.0)
        tl.store(x_ptr + row * 2 * width + column, gate_grad.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(x_ptr + row * 2 * width + width + column, up_grad.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + row * width + column, (gated * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_grad_ptr + row, tl.sum(total))


def weighted(x: Tensor, weights: Tensor, slope: float, limit: float) -> Tensor:
    """Return weights * (up + 1) * gate * sigmoid(slope * gate), [rows, width], of contiguous x = [gate, up]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        grid = (rows, triton.cdiv(width, _COLUMNS))
        _weighted[grid](x, weights, y, width, slope, limit, BLOCK=_COLUMNS, num_warps=4)
    return y


def weighted_backward(
    grad: Tensor, x: Tensor, weights: Tensor, slope: float, limit: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `weighted` does, the gradient of x, written over x, and that of the weights, fp32 [rows]."""
    rows, width = grad.shape
    y, weights_grad = torch.empty_like(grad), torch.empty_like(weights)
    if rows:
        _backward[(rows,)](grad, x, weights, y, weights_grad, width, slope, limit, BLOCK=_COLUMNS, num_warps=4)
    return y, x, weights_grad
