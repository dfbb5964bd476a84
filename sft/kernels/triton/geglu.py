"""GeGLU with the tanh form of GELU, gelu(gate) * up, in Triton. Backward writes the gradient over the input.

The tanh form is g * sigmoid(2 * u) with u = sqrt(2 / pi) * (g + 0.044715 * g^3), since (1 + tanh(u)) / 2 is
sigmoid(2 * u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _sigmoid(gate):
    return tl.sigmoid(2 * 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate))


@triton.jit
def _forward(x_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * _sigmoid(gate) * up
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    # With s = sigmoid(2 * u(g)): (g * s)' = s + g * s * (1 - s) * 2 * u'(g).
    sigmoid = _sigmoid(gate)
    slope = 2 * 0.7978845608028654 * (1 + 3 * 0.044715 * gate * gate)
    gate_grad = grad * up * (sigmoid + gate * sigmoid * (1 - sigmoid) * slope)
    tl.store(x_ptr + row * 2 * width + column, gate_grad.to(x_ptr.dtype.element_ty), mask=inside)
    up_grad = grad * gate * sigmoid
    tl.store(x_ptr + row * 2 * width + width + column, up_grad.to(x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """Return gelu(gate) * up, [rows, width], of x = [gate, up], contiguous [rows, 2 * width]."""
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
