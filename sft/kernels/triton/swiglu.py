"""SwiGLU, silu(gate) * up, in Triton. Backward writes the gradient over the input, to save its memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _forward(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    # silu(g) = g * sigmoid(g), so silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g)).
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    gate_grad = grad * up * (sigmoid + silu * (1 - sigmoid))
    tl.store(x_ptr + row * 2 * width + column, gate_grad.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(x_ptr + row * 2 * width + width + column, (grad * silu).to(x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """Return silu(gate) * up, [rows, width], of x = [gate, up], contiguous [rows, 2 * width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    _forward[(rows, triton.cdiv(width, _BLOCK))](x, y, width, BLOCK=_BLOCK, num_warps=4)
    return y


def backward_in_place(grad: Tensor, x: Tensor) -> Tensor:
    """Overwrite `x` with its gradient and return it. `grad` is contiguous [rows, width]."""
    # x is the largest activation of a layer, and nothing reads it after this.
    rows, width = grad.shape
    _backward[(rows, triton.cdiv(width, _BLOCK))](grad, x, width, BLOCK=_BLOCK, num_warps=4)
    return x
