"""A gated activation of a fused [gate; up] projection: SwiGLU or GeGLU (arXiv:2002.05202)."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.kernels.autograd import Context

Gate = Literal["silu", "gelu_tanh"]
"""What is taken of the gate: silu for SwiGLU, the tanh form of GELU for GeGLU."""


def gated(x: Tensor, gate: Gate) -> Tensor:
    """Return activation(gate) * up, [..., width], of x = [gate, up], [..., 2 * width].

    On a GPU backward writes the gradient over `x`: no other operation may need `x` in its own backward.
    """
    if x.is_cuda:
        activated: Tensor = _Gated.apply(x, gate)
        return activated
    values, up = x.chunk(2, dim=-1)
    return activate(values, gate) * up


def activate(values: Tensor, gate: Gate) -> Tensor:
    """Return the activation of a gate's values, by torch's own operations."""
    return F.silu(values) if gate == "silu" else F.gelu(values, approximate="tanh")


class _GatedContext(Context, Protocol):
    gate: Gate


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _GatedContext, x: Tensor, gate: Gate) -> Tensor:
        from sft.kernels.triton import gated as triton_gated  # installed with CUDA builds of torch only

        rows = x.contiguous().view(-1, x.shape[-1])
        ctx.save_for_backward(rows)
        ctx.gate = gate
        return triton_gated.forward(rows, gate).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: _GatedContext, grad: Tensor) -> tuple[Tensor, None]:
        from sft.kernels.triton import gated as triton_gated

        (rows,) = ctx.saved_tensors
        own = grad.contiguous().view(rows.shape[0], -1)
        return triton_gated.backward_in_place(own, rows, ctx.gate).view(*grad.shape[:-1], -1), None
