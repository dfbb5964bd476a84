"""RMSNorm (arXiv:1910.07467) fused with the residual stream.

In a pre-norm layer the residual x goes both into the norm and past it. The addition that makes x comes just before the
norm, and the sum of x's two gradients just after the norm's backward. On a GPU one kernel does each pair and moves x
through memory once; on a CPU these are torch's own operations.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.fp8 import Rows, WithRows, unquantized


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, centered: bool = False) -> Tensor:
    """Return the RMSNorm of `x` over its last dimension.

    A `centered` weight is one around 0: 1 + weight is what multiplies, in fp32 up to the end.
    """
    if x.is_cuda:
        return unquantized(fork(x, weight, eps, centered=centered)[0])
    if not centered:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x.float(), weight.shape, 1.0 + weight.float(), eps).to(x.dtype)


def fork(
    x: Tensor, weight: Tensor, eps: float, *, centered: bool = False, in_fp8: bool = False
) -> tuple[Tensor | WithRows, Tensor]:
    """Return the norm of `x` for a branch of the layer, and `x` itself as the residual that goes past it.

    Use the returned residual, not `x`: the gradients of both results are then added in the norm's backward kernel.
    With `in_fp8` the norm, on a GPU, also carries its rows in fp8 for the matrix product it goes into.
    """
    if not x.is_cuda:
        return rms_norm(x, weight, eps, centered=centered), x
    return _forked(x, None, weight, eps, centered, in_fp8)


def add_and_fork(
    branch: Tensor, residual: Tensor, weight: Tensor, eps: float, *, centered: bool = False, in_fp8: bool = False
) -> tuple[Tensor | WithRows, Tensor]:
    """Return `fork` of branch + residual."""
    if not branch.is_cuda:
        return fork(residual + branch, weight, eps, centered=centered)
    return _forked(residual, branch, weight, eps, centered, in_fp8)


def _forked(
    x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, centered: bool, in_fp8: bool
) -> tuple[Tensor | WithRows, Tensor]:
    normed, past, *low = _Norm.apply(x, branch, weight, eps, centered, in_fp8)
    return (WithRows(normed, Rows(*low)) if low else normed), past


def forget(normed: Tensor, past: Tensor, weight: Tensor, eps: float, result: Tensor, *, centered: bool = False) -> None:
    """Free the memory of `normed` until backward needs it, and then compute it again from `past`.

    `normed` and `past` are the two results of a fork, `result` what was computed from `normed`. Once the gradient of
    `result` exists, the norm is written into the same tensor, so that operations which saved it find its values.
    Nothing may read `normed` in between.
    """
    # `.data` does not share the version counter: else autograd would refuse a tensor written after it was saved.
    kept = [normed.data, past.detach()]
    size = normed.untyped_storage().nbytes()

    def renew(_: Tensor) -> None:
        memory, source = kept
        kept.clear()  # the graph, and this closure with it, can outlive its backward pass; the tensors must not
        memory.untyped_storage().resize_(size)
        if memory.is_cuda:
            from sft.kernels.triton import norm as triton_norm

            triton_norm.forward_into(memory, source, weight.detach(), eps, centered=centered)
        else:
            memory.copy_(rms_norm(source, weight.detach(), eps, centered=centered))

    result.register_hook(renew)
    normed.untyped_storage().resize_(0)


class _NormContext(Context, Protocol):
    has_branch: bool
    centered: bool


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _NormContext, x: Tensor, branch: Tensor | None, weight: Tensor, eps: float, centered: bool, in_fp8: bool
    ) -> tuple[Tensor, ...]:
        from sft.kernels.triton import norm as triton_norm  # installed with CUDA builds of torch only

        ctx.set_materialize_grads(False)  # a norm that is no fork has no second gradient to read
        rows = x.contiguous().view(-1, x.shape[-1])
        added = None if branch is None else branch.contiguous().view_as(rows)
        normed, total, rstd, low = triton_norm.forward(rows, added, weight, eps, centered=centered, quantize=in_fp8)
        ctx.save_for_backward(total, weight, rstd)
        ctx.has_branch, ctx.centered = branch is not None, centered
        past = x if branch is None else total
        if low is None:
            return normed.view_as(x), past.view_as(x)
        ctx.mark_non_differentiable(*low)
        return normed.view_as(x), past.view_as(x), *low

    @staticmethod
    def backward(
        ctx: _NormContext, grad: Tensor, past_grad: Tensor | None, *_: object
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None, None, None]:
        from sft.kernels.triton import norm as triton_norm

        total, weight, rstd = ctx.saved_tensors
        past = None if past_grad is None else past_grad.contiguous().view_as(total)
        own = grad.contiguous().view_as(total)
        x_grad, weight_grad = triton_norm.backward(
            own, past, total, weight, rstd, centered=ctx.centered, trained=ctx.needs_input_grad[2]
        )
        x_grad = x_grad.view_as(grad)
        # A sum passes its gradient on unchanged to both of its terms.
        return x_grad, x_grad if ctx.has_branch else None, weight_grad, None, None, None
