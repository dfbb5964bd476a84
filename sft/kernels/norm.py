"""RMSNorm that also carries the residual stream: the addition before it, and that of the gradients behind it.

On a CPU these are torch's own operations; on a GPU one kernel each way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x` over its last dimension."""
    return fork(x, weight, eps)[0] if x.is_cuda else F.rms_norm(x, weight.shape, weight, eps)


def fork(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(norm of x, x): what goes into a branch, and what goes past it. Their gradients meet in one kernel."""
    if not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps), x
    normed, past = _Norm.apply(x, None, weight, eps)
    return normed, past


def add_and_fork(branch: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`fork` of branch + residual."""
    if not branch.is_cuda:
        return fork(residual + branch, weight, eps)
    normed, past = _Norm.apply(residual, branch, weight, eps)
    return normed, past


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        from sft.kernels import triton_norm  # Triton is there where CUDA is

        rows = x.contiguous().view(-1, x.shape[-1])
        added = None if branch is None else branch.contiguous().view_as(rows)
        normed, total, rstd = triton_norm.forward(rows, added, weight, eps)
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_branch = branch is not None
        return normed.view_as(x), x.view_as(x) if branch is None else total.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, past_grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor, None]:
        from sft.kernels import triton_norm

        total, weight, rstd = ctx.saved_tensors
        parts = (grad.contiguous().view_as(total), past_grad.contiguous().view_as(total))
        x_grad, weight_grad = triton_norm.backward(*parts, total, weight, rstd)
        x_grad = x_grad.view_as(grad)
        return x_grad, x_grad if ctx.has_branch else None, weight_grad, None
