"""GeGLU with the tanh form of GELU, gelu(gate) * up, of a fused [gate; up] projection (arXiv:2002.05202)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context


def geglu(x: Tensor) -> Tensor:
    """Return gelu(gate) * up, [..., width], of x = [gate, up], [..., 2 * width].

    On a GPU backward writes the gradient over `x`: no other operation may need `x` in its own backward.
    """
    if x.is_cuda:
        activated: Tensor = _GeGLU.apply(x)
        return activated
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        from sft.kernels.triton import geglu as triton_geglu  # installed with CUDA builds of torch only

        rows = x.contiguous().view(-1, x.shape[-1])
        ctx.save_for_backward(rows)
        return triton_geglu.forward(rows).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        from sft.kernels.triton import geglu as triton_geglu

        (rows,) = ctx.saved_tensors
        own = grad.contiguous().view(rows.shape[0], -1)
        return triton_geglu.backward_in_place(own, rows).view(*grad.shape[:-1], -1)
