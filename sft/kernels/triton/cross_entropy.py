"""Softmax statistics of logits, and the logits overwritten with their gradient, in Triton.

Two kernels, because tensor parallel ranks exchange maximum and sum between them. Together they read the logits twice
and write them once. One kernel would do the same: a row of logits does not fit into the memory of a multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sft.kernels.loss_form import LossForm

_BLOCK = 8192


@triton.jit
def _cap(x, softcap):
    # tanh(u) = 2 * sigmoid(2 * u) - 1
    return softcap * (2 * tl.sigmoid(2 * x / softcap) - 1)


@triton.jit
def _statistics(
    logits_ptr, label_ptr, max_ptr, sum_ptr, label_logit_ptr, logit_sum_ptr, stride, width, softcap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One program a row. Maximum and sum in one pass (online softmax, arXiv:1805.02867), kept for each lane of the block
    # and joined at the end, so that lanes do not wait for each other.
    row = tl.program_id(0).to(tl.int64)  # row * stride exceeds 32 bits
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    plain = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        if CAPPED:  # the cap would make -inf finite
            x = tl.where(column < width, _cap(x, softcap), float("-inf"))
        new = tl.maximum(largest, x)
        safe = tl.where(new == float("-inf"), 0.0, new)  # a lane without a column yet: -inf - -inf would be NaN
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = new
        plain += tl.where(column < width, x, 0.0)
    peak = tl.max(largest, axis=0)
    tl.store(max_ptr + row, peak)
    # Again only for lanes that saw a column; a rank whose columns are all padding has none.
    tl.store(sum_ptr + row, tl.sum(tl.where(total > 0, total * tl.exp(largest - peak), total), axis=0))
    tl.store(logit_sum_ptr + row, tl.sum(plain, axis=0))
    # The label may be another rank's: then any valid address is read and the value dropped.
    label = tl.load(label_ptr + row)
    here = (label >= 0) & (label < width)
    logit = tl.load(logits_ptr + row * stride + tl.where(here, label, 0)).to(tl.float32)
    if CAPPED:
        logit = _cap(logit, softcap)
    tl.store(label_logit_ptr + row, tl.where(here, logit, 0.0))


@triton.jit
def _gradient(
    logits_ptr, label_ptr, log_sum_ptr, weight_ptr, stride, width, softcap, smoothing, each,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + column
    log_sum, weight, label = tl.load(log_sum_ptr + row), tl.load(weight_ptr + row), tl.load(label_ptr + row)
    x = tl.load(at, mask=column < width, other=float("-inf")).to(tl.float32)  # exp(-inf) = 0 for padding columns
    if CAPPED:
        x = tl.where(column < width, _cap(x, softcap), float("-inf"))
    target = tl.where(column == label, 1.0 - smoothing, 0.0) + tl.where(column < width, each, 0.0)
    grad = (tl.exp(x - log_sum) - target) * weight
    if CAPPED:
        slope = 1 - (x / softcap) * (x / softcap)
        grad = tl.where(column < width, grad * slope, 0.0)
    tl.store(at, grad.to(logits_ptr.dtype.element_ty), mask=column < stride)


def statistics(
    logits: Tensor, labels: Tensor, width: int, softcap: float | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return statistics of each row's first `width` columns, in fp32.

    They are the maximum, the sum of exp(logit - maximum), the label's logit, and the sum of the logits. logits [rows,
    columns] are contiguous. labels [rows] count from this rank's first column; outside [0, width) they belong to
    another rank, and the label's logit is 0. With a `softcap` c all is of c * tanh(logits / c).
    """
    rows, stride = logits.shape
    peak, total, label_logit, logit_sum = logits.new_empty((4, rows), dtype=torch.float32)
    if rows:
        _statistics[(rows,)](
            logits, labels, peak, total, label_logit, logit_sum, stride, width, softcap or 1.0,
            CAPPED=softcap is not None, BLOCK=_BLOCK, num_warps=16,
        )  # fmt: skip
    return peak, total, label_logit, logit_sum


def gradient_in_place(
    logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, width: int, form: LossForm
) -> Tensor:
    """Overwrite and return `logits`, as weight * (softmax - target), and 0 after the first `width` columns.

    The target is `form.each` for all tokens and 1 - `form.smoothing` more for the label. With a cap the softmax is of
    the capped logits, and the gradient that of the logits before the cap.
    """
    rows, stride = logits.shape
    if rows:
        grid = (rows, triton.cdiv(stride, _BLOCK))
        _gradient[grid](
            logits, labels, log_sum, weights, stride, width, form.softcap or 1.0, form.smoothing, form.each,
            CAPPED=form.softcap is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return logits
