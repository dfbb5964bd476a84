"""Kernels of a mixture of experts in Triton. No sum is made by atomic additions: two runs give the same bits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024
_TILE = {"TILE_M": 128, "TILE_N": 256, "TILE_K": 64}


@triton.jit
def _sum_rows(rows_ptr, place_ptr, out_ptr, width, CHOSEN: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(CHOSEN):
        row = tl.load(place_ptr + token * CHOSEN + k)
        total += tl.load(rows_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * width + column, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_swiglu(x_ptr, weights_ptr, y_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up * tl.load(weights_ptr + row)
    tl.store(y_ptr + row * width + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weighted_swiglu_backward(grad_ptr, x_ptr, weights_ptr, y_ptr, weights_grad_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    weight = tl.load(weights_ptr + row)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
        gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
        # silu(g) = g * sigmoid(g), so silu'(g) = sigmoid(g) + silu(g) * (1 - sigmoid(g)).
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        total += grad * silu * up
        own = grad * weight
        gate_grad = own * up * (sigmoid + silu * (1 - sigmoid))
        tl.store(x_ptr + row * 2 * width + column, gate_grad.to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(x_ptr + row * 2 * width + width + column, (own * silu).to(x_ptr.dtype.element_ty), mask=inside)
        tl.store(y_ptr + row * width + column, (silu * up * weight).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(weights_grad_ptr + row, tl.sum(total))


@triton.jit
def _weight_gradients(
    grad_ptr,
    inputs_ptr,
    ends_ptr,
    out_ptr,
    M,
    N,
    OVERWRITE: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_K: tl.constexpr,
):
    expert = tl.program_id(1)
    across = tl.cdiv(N, TILE_N)
    m = (tl.program_id(0) // across) * TILE_M + tl.arange(0, TILE_M)
    n = (tl.program_id(0) % across) * TILE_N + tl.arange(0, TILE_N)
    begin = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends_ptr + expert)
    total = tl.zeros((TILE_M, TILE_N), tl.float32)
    for first in range(begin, end, TILE_K):
        k = (first + tl.arange(0, TILE_K)).to(tl.int64)
        grad = tl.load(grad_ptr + k[:, None] * M + m[None, :], mask=(k < end)[:, None] & (m < M)[None, :], other=0.0)
        rows = tl.load(inputs_ptr + k[:, None] * N + n[None, :], mask=(k < end)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(tl.trans(grad), rows, total)
    place = out_ptr + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    if not OVERWRITE:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=inside)


def sum_rows(rows: Tensor, place: Tensor, chosen: int) -> Tensor:
    """Return the sum of each token's rows, which are at `place` [tokens * chosen], added up in fp32."""
    rows, tokens, width = rows.contiguous(), len(place) // chosen, rows.size(-1)
    out = torch.empty(tokens, width, dtype=rows.dtype, device=rows.device)
    if tokens:
        grid = (tokens, triton.cdiv(width, _COLUMNS))
        _sum_rows[grid](rows, place, out, width, CHOSEN=chosen, BLOCK=_COLUMNS, num_warps=4)
    return out


def weighted_swiglu(x: Tensor, weights: Tensor) -> Tensor:
    """Return weights * silu(gate) * up, [rows, width], of x = [gate, up], contiguous [rows, 2 * width]."""
    rows, width = x.shape[0], x.shape[1] // 2
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if rows:
        _weighted_swiglu[(rows, triton.cdiv(width, _COLUMNS))](x, weights, y, width, BLOCK=_COLUMNS, num_warps=4)
    return y


def weighted_swiglu_backward(grad: Tensor, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights * silu(gate) * up, the gradient of x, written over x, and that of the weights, fp32 [rows]."""
    rows, width = grad.shape
    y, weights_grad = torch.empty_like(grad), torch.empty_like(weights)
    if rows:
        _weighted_swiglu_backward[(rows,)](grad, x, weights, y, weights_grad, width, BLOCK=_COLUMNS, num_warps=4)
    return y, x, weights_grad


def add_weight_gradients(out: Tensor, grad: Tensor, inputs: Tensor, ends: Tensor, *, overwrite: bool) -> None:
    """Add grad^T @ inputs over each expert's rows to out [experts, M, N], or write it there with `overwrite`.

    grad is [rows, M] and inputs [rows, N], both contiguous and sorted by expert. An expert without rows gets zeros.
    """
    experts, m, n = out.shape
    grid = (triton.cdiv(m, _TILE["TILE_M"]) * triton.cdiv(n, _TILE["TILE_N"]), experts)
    _weight_gradients[grid](grad, inputs, ends, out, m, n, OVERWRITE=overwrite, **_TILE, num_warps=8, num_stages=3)
