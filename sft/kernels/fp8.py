"""Matrix products in fp8 (E4M3 or E5M2, arXiv:2209.05433) with a scale for each row of both factors.

The more values share a scale, the more of the small ones round to zero, so each token and each output channel has its
own. Scales come from the values themselves, not from earlier steps: there is no history to save, and a resumed run
computes the same.

On a GPU the product is torch's (`torch._scaled_mm`, 1.8 times as fast as in bf16 on an H100). Elsewhere the same
rounded values are multiplied in fp32, for tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sft.kernels.gradient_buffer import has_gradient

Format = Literal["e4m3", "e5m2"]
"""E4M3 keeps 3 bits after the leading one and values down to 4e-6 of the row's largest, E5M2 2 bits, and down to 3e-10.
"""
DTYPES: dict[Format, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
LARGEST: dict[Format, float] = {"e4m3": 448.0, "e5m2": 57344.0}
"""The largest finite value of each."""
_SMALLEST = 1e-12
"""Lower bound of a row's largest value, so that a row of zeros has a scale other than 0."""
_PEAKS = "fp8_column_peaks"


@dataclass(frozen=True, slots=True)
class Rows:
    """A matrix [rows, columns] in fp8; row i is scales[i] * values[i]."""

    values: Tensor
    scales: Tensor
    """fp32, [rows, 1]."""


@dataclass(frozen=True, slots=True)
class WithRows:
    """A tensor together with its rows in fp8, from an operation that had both at hand."""

    values: Tensor
    rows: Rows


def quantize(x: Tensor, form: Format = "e4m3") -> Rows:
    """Return contiguous `x` [rows, columns] in fp8."""
    if x.is_cuda:
        from sft.kernels.triton import fp8 as triton_fp8  # installed with CUDA builds of torch only

        return Rows(*triton_fp8.rows(x, DTYPES[form], LARGEST[form]))
    scales = x.float().abs().amax(dim=1, keepdim=True).clamp(min=_SMALLEST) / LARGEST[form]
    return Rows((x.float() * (1 / scales)).to(DTYPES[form]), scales)


def quantize_transposed(weight: Tensor, count: int = 1) -> Rows:
    """Return the transposes of `count` matrices, contiguous one below the other, in fp8, again one below the other.

    Each column of a matrix has a scale. The largest value of each column is found once a step, not in each
    micro-batch, and of a frozen weight once.
    """
    if not weight.is_cuda:
        matrices = weight.view(count, -1, weight.size(1)).transpose(1, 2)
        return quantize(matrices.reshape(-1, matrices.size(2)))
    from sft.kernels.triton import fp8 as triton_fp8

    # Weights change between steps, and a step begins with no gradient in the weight's buffer.
    peaks: Tensor | None = getattr(weight, _PEAKS, None)
    if peaks is None or (weight.requires_grad and not has_gradient(weight)):
        peaks = triton_fp8.column_peaks(weight, count)
        setattr(weight, _PEAKS, peaks)
    return Rows(*triton_fp8.transposed(weight, peaks, count))


def unquantized(x: Tensor | WithRows) -> Tensor:
    """Return the tensor itself."""
    return x.values if isinstance(x, WithRows) else x


def rows_of(x: Tensor | WithRows) -> Rows:
    """Return [..., columns] in fp8: the rows that come along with it, or those computed now."""
    return x.rows if isinstance(x, WithRows) else quantize(x.detach().contiguous().view(-1, x.shape[-1]))


def product(a: Rows, b: Rows, dtype: torch.dtype) -> Tensor:
    """Return a @ b^T, [rows of a, rows of b], in `dtype`.

    b is in E4M3. On a GPU both of its dimensions must be multiples of 16.
    """
    if a.values.is_cuda:
        # Fast accumulation sums in the tensor cores alone: quicker than moving partial sums to fp32, and less exact.
        result: Tensor = torch._scaled_mm(
            a.values, b.values.t(), a.scales, b.scales.t(), out_dtype=dtype, use_fast_accum=True
        )
        return result
    return ((a.values.float() * a.scales) @ (b.values.float() * b.scales).t()).to(dtype)
