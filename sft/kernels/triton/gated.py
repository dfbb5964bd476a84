"""SwiGLU and GeGLU, activation(gate) * up, in Triton. Backward writes the gradient over the input, to save its memory.

Both activations are g * sigmoid(w(g)): w(g) = g for silu, and 2 * sqrt(2 / pi) * (g + 0.044715 * g^3) for the tanh form
of GELU, since (1 + tanh(u)) / 2 = sigmoid(2 * u).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def activated(gate, GELU: tl.constexpr):
    """Return the activation of the gate and its derivative, s + g * s * (1 - s) * w'(g) with s = sigmoid(w(g))."""
    if GELU:
        square = gate * gate
        sigmoid = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * square))
        y = gate * sigmoid
        slope = sigmoid + y * (1 - sigmoid) * 1.5957691216057308 * (1 + 3 * 0.044715 * square)
    else:
        sigmoid = tl.sigmoid(gate)
        y = gate * sigmoid
        slope = sigmoid + y * (1 - sigmoid)
    return y, slope


@triton.jit
def _forward(x_ptr, y_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value, _ = activated(gate, GELU)
    tl.store(y_ptr + row * width + column, (value * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad_ptr, x_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    value, slope = activated(gate, GELU)
    tl.store(x_ptr + row * 2 * width + column, (grad * up * slope).to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(x_ptr + row * 2 * width + width + column, (grad * value).to(x_ptr.dtype.element_ty), mask=inside)


def forward(x: Tensor, gate: str) -> Tensor:
    """Return activation(gate) * up, [rows, width], of x = [gate, up], contiguous [rows, 2 * width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (rows, triton.cdiv(width, _BLOCK))
    _forward[grid](x, y, width, GELU=gate == "gelu_tanh", BLOCK=_BLOCK, num_warps=4)
    return y


def backward_in_place(grad: Tensor, x: Tensor, gate: str) -> Tensor:
    """Overwrite `x` with its gradient and return it. `grad` is contiguous [rows, width]."""
    # x is the largest activation of a layer, and nothing reads it after this.
    rows, width = grad.shape
    grid = (rows, triton.cdiv(width, _BLOCK))
    _backward[grid](grad, x, width, GELU=gate == "gelu_tanh", BLOCK=_BLOCK, num_warps=4)
    return x
