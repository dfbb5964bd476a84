"""Softmax statistics of logits, and their gradient in place of them, in Triton.

Two kernels instead of one: between them, tensor parallel ranks agree on maximum and sum. Together they read the logits
twice and write them once, which is what one kernel would do, because a row does not fit into a processor's memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 8192


@triton.jit
def _statistics(logits_ptr, label_ptr, max_ptr, sum_ptr, label_logit_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + row * stride + column, mask=column < width, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, x)
        safe = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - safe) + tl.exp(x - safe)
        largest = new
    peak = tl.max(largest, axis=0)
    tl.store(max_ptr + row, peak)
    tl.store(sum_ptr + row, tl.sum(tl.where(total > 0, total * tl.exp(largest - peak), total), axis=0))
    label = tl.load(label_ptr + row)
    here = (label >= 0) & (label < width)
    logit = tl.load(logits_ptr + row * stride + tl.where(here, label, 0))
    tl.store(label_logit_ptr + row, tl.where(here, logit.to(tl.float32), 0.0))


@triton.jit
def _gradient(logits_ptr, label_ptr, log_sum_ptr, weight_ptr, stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = logits_ptr + row * stride + column
    log_sum, weight, label = tl.load(log_sum_ptr + row), tl.load(weight_ptr + row), tl.load(label_ptr + row)
    x = tl.load(at, mask=column < width, other=float("-inf")).to(tl.float32)
    grad = (tl.exp(x - log_sum) - tl.where(column == label, 1.0, 0.0)) * weight
    tl.store(at, grad.to(logits_ptr.dtype.element_ty), mask=column < stride)


def statistics(logits: Tensor, labels: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """(maximum, sum of exp(logit - maximum), logit of the label or 0) of each row's first `width` columns, in fp32.

    logits [rows, columns] contiguous; labels count from this rank's first column, outside [0, width) for others'.
    """
    rows, stride = logits.shape
    peak, total, label_logit = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        _statistics[(rows,)](logits, labels, peak, total, label_logit, stride, width, BLOCK=_BLOCK, num_warps=16)
    return peak, total, label_logit


def gradient_in_place(logits: Tensor, labels: Tensor, log_sum: Tensor, weights: Tensor, width: int) -> Tensor:
    """weight * (softmax - onehot(label)) in the memory of `logits`, 0 behind the first `width` columns."""
    rows, stride = logits.shape
    if rows:
        grid = (rows, triton.cdiv(stride, _BLOCK))
        _gradient[grid](logits, labels, log_sum, weights, stride, width, BLOCK=_BLOCK, num_warps=8)
    return logits
