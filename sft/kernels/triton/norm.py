"""RMSNorm in Triton, fused with the residual addition before it, the addition of gradients after it, and fp8 rounding.

One program reads a row once and holds it whole. The weight's gradient is summed over rows by a fixed number of
programs, each over its share in order, and then over the programs. So there are no atomics, and a repeated step gives
the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.triton.fp8 import LARGEST, empty_rows, store_row

_PROGRAMS_PER_PROCESSOR = 4


@triton.jit
def _forward(
    x_ptr, branch_ptr, weight_ptr, normed_ptr, sum_ptr, rstd_ptr, low_ptr, scale_ptr, columns, eps,
    HAS_BRANCH: tl.constexpr, CENTERED: tl.constexpr, QUANTIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < columns
    x = tl.load(x_ptr + row * columns + column, mask=inside, other=0.0)
    if HAS_BRANCH:
        branch = tl.load(branch_ptr + row * columns + column, mask=inside, other=0.0)
        # Rounded before the norm is taken: backward recomputes from the stored sum and must see the same values.
        x = (x.to(tl.float32) + branch.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row * columns + column, x, mask=inside)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, axis=0) / columns + eps)
    tl.store(rstd_ptr + row, rstd)
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if CENTERED:
        weight += 1
    normed = (wide * rstd * weight).to(normed_ptr.dtype.element_ty)
    tl.store(normed_ptr + row * columns + column, normed, mask=inside)
    if QUANTIZE:
        # From the rounded norm, so that fp8 values are the same as those of a norm read back from memory.
        store_row(normed.to(tl.float32), low_ptr, scale_ptr, row, columns, column, inside, LARGEST)


@triton.jit
def _backward(
    grad_ptr, residual_grad_ptr, x_ptr, weight_ptr, rstd_ptr, x_grad_ptr, partial_ptr, rows, columns, share,
    HAS_RESIDUAL: tl.constexpr, CENTERED: tl.constexpr, TRAINED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # With u = x * rstd, y = u * w and g = dL/dy: dL/dw = sum over rows of g * u, and
    # dL/dx = rstd * (g * w - u * mean(g * w * u)), the mean over columns.
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + column, mask=column < columns, other=0.0).to(tl.float32)
    if CENTERED:
        weight += 1
    weight_grad = tl.zeros((BLOCK,), dtype=tl.float32)
    for index in range(share):
        row = program * share + index
        place = row * columns + column
        inside = (column < columns) & (row < rows)
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
        unit = x * rstd
        if TRAINED:
            weight_grad += grad * unit
        scaled = grad * weight
        x_grad = rstd * (scaled - unit * (tl.sum(scaled * unit, axis=0) / columns))
        if HAS_RESIDUAL:
            x_grad += tl.load(residual_grad_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_grad_ptr + place, x_grad.to(x_grad_ptr.dtype.element_ty), mask=inside)
    if TRAINED:
        tl.store(partial_ptr + program * columns + column, weight_grad, mask=column < columns)


def forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, *, centered: bool = False, quantize: bool = False
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Return the norm of x + branch, x + branch, 1 / root mean square of each row, and the norm in fp8.

    x and branch are contiguous [rows, columns]. A `centered` weight multiplies as 1 + weight. The fp8 form is what
    `triton.fp8.rows` makes of the norm; None unless `quantize` is set.
    """
    rstd = torch.empty(len(x), dtype=torch.float32, device=x.device)
    normed = torch.empty_like(x)
    total = x if branch is None else torch.empty_like(x)
    low = empty_rows(x, *x.shape) if quantize else None
    _launch(x, branch, weight, normed, total, rstd, low, eps, centered)
    return normed, total, rstd, low


def forward_into(normed: Tensor, x: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> None:
    """Write the norm of contiguous `x` [..., columns] to `normed`: the same bits as `forward` returns."""
    rows = x.view(-1, x.shape[-1])
    _launch(rows, None, weight, normed, rows, torch.empty(len(rows), device=x.device), None, eps, centered)


def _launch(
    x: Tensor, branch: Tensor | None, weight: Tensor, normed: Tensor, total: Tensor, rstd: Tensor,
    low: tuple[Tensor, Tensor] | None, eps: float, centered: bool,
) -> None:  # fmt: skip
    rows, columns = x.shape
    block = triton.next_power_of_2(columns)
    # A kernel takes no None: what it does not use gets any tensor.
    _forward[(rows,)](
        x, x if branch is None else branch, weight, normed, total, rstd, *((x, rstd) if low is None else low),
        columns, eps, HAS_BRANCH=branch is not None, CENTERED=centered, QUANTIZE=low is not None, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip


def backward(
    grad: Tensor, residual_grad: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor, *, centered: bool = False,
    trained: bool = True,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return the gradients of x and of the weight, None unless it is `trained`.

    `grad` is the gradient of the norm, `residual_grad` that of x past the norm, if there is one; both contiguous
    [rows, columns].
    """
    rows, columns = x.shape
    # More programs would read memory no faster, and each has a row of `partial` to sum afterwards.
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    programs = min(rows, processors * _PROGRAMS_PER_PROCESSOR)
    x_grad = torch.empty_like(x)
    partial = torch.empty(programs if trained else 0, columns, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    _backward[(programs,)](
        grad, grad if residual_grad is None else residual_grad, x, weight, rstd, x_grad, partial, rows, columns,
        triton.cdiv(rows, programs),
        HAS_RESIDUAL=residual_grad is not None, CENTERED=centered, TRAINED=trained, BLOCK=block,
        num_warps=_warps(block),
    )  # fmt: skip
    return x_grad, partial.sum(dim=0).to(weight.dtype) if trained else None


def _warps(block: int) -> int:
    return min(max(block // 512, 4), 16)
