"""Quantize to fp8 with a scale for each row, in Triton: a matrix, its transpose, or the result of SwiGLU.

One program holds a whole row and knows its largest value before it writes, so a tensor is read once. Only the
transpose, whose scales are those of columns, reads it twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.triton.gated import activated

E4M3 = torch.float8_e4m3fn
_E4M3_LARGEST = 448.0
LARGEST = tl.constexpr(_E4M3_LARGEST)
"""The largest finite value of E4M3."""
_SMALLEST = tl.constexpr(1e-12)  # keeps the scale of a row of zeros above 0
_TILE = 64  # rows and columns of a block that is transposed
_WIDE = 256  # columns of a program that looks for the largest value of each


@triton.jit
def store_row(x, y_ptr, scale_ptr, row, columns, column, inside, LIMIT: tl.constexpr):
    # The scale maps the row's largest value to the largest of this fp8.
    scale = tl.maximum(tl.max(tl.abs(x), axis=0), _SMALLEST) / LIMIT
    tl.store(scale_ptr + row, scale)
    tl.store(y_ptr + row * columns + column, (x * (1.0 / scale)).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rows(x_ptr, y_ptr, scale_ptr, columns, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0).to(tl.float32)
    store_row(x, y_ptr, scale_ptr, row, columns, column, inside, LIMIT)


@triton.jit
def _column_peaks(x_ptr, peak_ptr, rows, columns, SHARE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # A program takes COLUMNS columns and SHARE rows of one of the matrices, which lie one below the other.
    x_ptr += tl.program_id(2).to(tl.int64) * rows * columns
    peak_ptr += tl.program_id(2).to(tl.int64) * columns
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.program_id(1).to(tl.int64) * SHARE
    peak = tl.zeros((COLUMNS,), dtype=tl.float32)
    for start in range(0, SHARE, ROWS):
        row = first + start + tl.arange(0, ROWS)
        inside = (row < tl.minimum(rows, first + SHARE))[:, None] & (column < columns)[None, :]
        x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.max(tl.abs(x), axis=0))
    tl.atomic_max(peak_ptr + column, peak, mask=column < columns)  # a maximum is the same in any order


@triton.jit
def _transposed(x_ptr, peak_ptr, y_ptr, scale_ptr, rows, columns, TILE: tl.constexpr):
    matrix = tl.program_id(2).to(tl.int64)
    x_ptr += matrix * rows * columns
    y_ptr += matrix * rows * columns
    peak_ptr += matrix * columns
    scale_ptr += matrix * columns
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    peak = tl.load(peak_ptr + column, mask=column < columns, other=1.0)
    scale = tl.maximum(peak, _SMALLEST) / LARGEST
    factor = 1.0 / scale
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    y = (x * factor[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + column[None, :] * rows + row[:, None], y, mask=inside)
    if tl.program_id(0) == 0:  # all programs of these columns have the same scales
        tl.store(scale_ptr + column, scale, mask=column < columns)


@triton.jit
def _gated(x_ptr, y_ptr, scale_ptr, width, GELU: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(x_ptr + row * 2 * width + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * width + width + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded as the bf16 version stores it, so that both versions quantize the same values.
    value, _ = activated(gate, GELU)
    y = (value * up).to(x_ptr.dtype.element_ty).to(tl.float32)
    store_row(y, y_ptr, scale_ptr, row, width, column, inside, LARGEST)


@triton.jit
def _gated_backward(
    grad_ptr, x_ptr, y_ptr, low_ptr, scale_ptr, width,
    GELU: tl.constexpr, QUANTIZE: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < width
    first, second = row * 2 * width + column, row * 2 * width + width + column
    grad = tl.load(grad_ptr + row * width + column, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + second, mask=inside, other=0.0).to(tl.float32)
    value, slope = activated(gate, GELU)
    tl.store(y_ptr + row * width + column, (value * up).to(y_ptr.dtype.element_ty), mask=inside)
    gate_grad = grad * up * slope
    up_grad = grad * value
    tl.store(x_ptr + first, gate_grad.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(x_ptr + second, up_grad.to(x_ptr.dtype.element_ty), mask=inside)
    if QUANTIZE:
        # Gate and up are one row of the product that follows, and share its scale.
        peak = tl.maximum(tl.max(tl.abs(gate_grad), axis=0), tl.max(tl.abs(up_grad), axis=0))
        scale = tl.maximum(peak, _SMALLEST) / LIMIT
        factor = 1.0 / scale
        tl.store(scale_ptr + row, scale)
        tl.store(low_ptr + first, (gate_grad * factor).to(low_ptr.dtype.element_ty), mask=inside)
        tl.store(low_ptr + second, (up_grad * factor).to(low_ptr.dtype.element_ty), mask=inside)


def rows(x: Tensor, dtype: torch.dtype = E4M3, largest: float = _E4M3_LARGEST) -> tuple[Tensor, Tensor]:
    """Return contiguous `x` [rows, columns] as fp8 values and the fp32 scale of each row, [rows, 1].

    `largest` is the largest finite value of `dtype`.
    """
    count, columns = x.shape
    y, scale = empty_rows(x, count, columns, dtype)
    block = triton.next_power_of_2(columns)
    _rows[(count,)](x, y, scale, columns, LIMIT=largest, BLOCK=block, num_warps=_warps(block))
    return y, scale


def column_peaks(x: Tensor, count: int = 1) -> Tensor:
    """Return the largest absolute value of each column of `count` matrices, contiguous one below the other, in fp32."""
    rows, columns = len(x) // count, x.shape[1]
    peaks = torch.zeros(count * columns, dtype=torch.float32, device=x.device)
    share = max(triton.cdiv(rows, 64), 32)  # at most 64 programs for the same columns
    grid = (triton.cdiv(columns, _WIDE), triton.cdiv(rows, share), count)
    _column_peaks[grid](x, peaks, rows, columns, SHARE=share, ROWS=32, COLUMNS=_WIDE, num_warps=8)
    return peaks


def transposed(x: Tensor, peaks: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Return the transposes of `count` matrices, each [rows, columns] and contiguous one below the other.

    As fp8 values [count * columns, rows] and scales [count * columns, 1]. `peaks` are the `column_peaks` of `x`.
    """
    rows, columns = len(x) // count, x.shape[1]
    y, scale = empty_rows(x, count * columns, rows)
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE), count)
    _transposed[grid](x, peaks, y, scale, rows, columns, TILE=_TILE, num_warps=4)
    return y, scale


def gated(x: Tensor, gate: str) -> tuple[Tensor, Tensor]:
    """Return activation(gate) * up, of x = [gate, up] contiguous [rows, 2 * width], as fp8 values and scales."""
    count, width = x.shape[0], x.shape[1] // 2
    y, scale = empty_rows(x, count, width)
    block = triton.next_power_of_2(width)
    _gated[(count,)](x, y, scale, width, GELU=gate == "gelu_tanh", BLOCK=block, num_warps=_warps(block))
    return y, scale


def gated_backward(
    grad: Tensor, x: Tensor, gate: str, quantized: tuple[torch.dtype, float] | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Overwrite `x` = [gate, up] with its gradient, and return activation(gate) * up.

    With `quantized`, a type of fp8 and its largest finite value, also return the gradient of `x` as values of that type
    and scales.
    """
    count, width = grad.shape
    y = torch.empty_like(grad)
    dtype, largest = quantized or (E4M3, _E4M3_LARGEST)
    low = None if quantized is None else empty_rows(x, x.shape[0], x.shape[1], dtype)
    block = triton.next_power_of_2(width)
    _gated_backward[(count,)](
        grad, x, y, x if low is None else low[0], x if low is None else low[1], width,
        GELU=gate == "gelu_tanh", QUANTIZE=quantized is not None, LIMIT=largest, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return y, low


def empty_rows(x: Tensor, count: int, columns: int, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Return uninitialized fp8 values [count, columns] and scales [count, 1] on the device of `x`."""
    values = torch.empty(count, columns, dtype=dtype, device=x.device)
    return values, torch.empty(count, 1, dtype=torch.float32, device=x.device)


def _warps(block: int) -> int:
    # About 16 elements of a row for each thread, as far as a program can have threads.
    return min(max(block // 512, 4), 16)
