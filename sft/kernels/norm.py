"""RMSNorm that also carries the residual stream: the addition before it, and that of the gradients behind it.

On a CPU these are torch's own operations; on a GPU one kernel each way.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels import fp8


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The norm of `x` over its last dimension."""
    return fork(x, weight, eps)[0] if x.is_cuda else F.rms_norm(x, weight.shape, weight, eps)


def fork(x: Tensor, weight: Tensor, eps: float, *, in_fp8: bool = False) -> tuple[Tensor, Tensor]:
    """(norm of x, x): what goes into a branch, and what goes past it. Their gradients meet in one kernel.

    With `in_fp8` the norm, on a GPU, brings its rows in fp8 along for the product that it goes into.
    """
    if not x.is_cuda:
        return F.rms_norm(x, weight.shape, weight, eps), x
    return _forked(x, None, weight, eps, in_fp8)


def add_and_fork(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float, *, in_fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """`fork` of branch + residual."""
    if not branch.is_cuda:
        return fork(residual + branch, weight, eps)
    return _forked(residual, branch, weight, eps, in_fp8)


def _forked(x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, in_fp8: bool) -> tuple[Tensor, Tensor]:
    normed, past, *low = _Norm.apply(x, branch, weight, eps, in_fp8)
    if low:
        fp8.attach(normed, fp8.Rows(*low))
    return normed, past


def forget(normed: Tensor, past: Tensor, weight: Tensor, eps: float, result: Tensor) -> None:
    """Free the memory of `normed`, one half of a fork, until the gradient of `result`, made of it, is there.

    Then it is computed again from the other half, into the same tensor: who kept it for backward finds it as it was.
    Nobody may read it in between.
    """
    # No versions are counted for .data: autograd would take a tensor that was written twice for a wrong one.
    kept = [normed.data, past.detach()]
    size = normed.untyped_storage().nbytes()

    def renew(_: Tensor) -> None:
        memory, source = kept
        kept.clear()  # the graph, and this with it, can outlive its backward pass; these must not
        memory.untyped_storage().resize_(size)
        if memory.is_cuda:
            from sft.kernels.triton import norm as triton_norm

            triton_norm.forward_into(memory, source, weight.detach(), eps)
        else:
            memory.copy_(F.rms_norm(source, weight.shape, weight.detach(), eps))

    result.register_hook(renew)
    normed.untyped_storage().resize_(0)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, in_fp8: bool
    ) -> tuple[Tensor, ...]:
        from sft.kernels.triton import norm as triton_norm  # Triton is there where CUDA is

        rows = x.contiguous().view(-1, x.shape[-1])
        added = None if branch is None else branch.contiguous().view_as(rows)
        normed, total, rstd, low = triton_norm.forward(rows, added, weight, eps, quantize=in_fp8)
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_branch = branch is not None
        past = x if branch is None else total
        if low is None:
            return normed.view_as(x), past.view_as(x)
        ctx.mark_non_differentiable(*low)
        return normed.view_as(x), past.view_as(x), *low

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor, past_grad: Tensor, *_: Any
    ) -> tuple[Tensor, Tensor | None, Tensor, None, None]:
        from sft.kernels.triton import norm as triton_norm

        total, weight, rstd = ctx.saved_tensors
        parts = (grad.contiguous().view_as(total), past_grad.contiguous().view_as(total))
        x_grad, weight_grad = triton_norm.backward(*parts, total, weight, rstd)
        x_grad = x_grad.view_as(grad)
        return x_grad, x_grad if ctx.has_branch else None, weight_grad, None, None
