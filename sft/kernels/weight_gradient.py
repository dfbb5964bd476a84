"""Weight gradients added to fp32 buffers by the matrix product itself.

Otherwise each is written in bf16, read, and added: three times the traffic, and a rounding in between. The product in
half precision with an fp32 result is one call of the GPU's library, and torch has it from 2.8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b; out [m, n] in fp32, or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; out [m, n] in fp32, or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def weight_gradient(weight: Tensor, grad_output: Tensor, inputs: Tensor) -> Tensor:
    """What autograd gets as the gradient grad_output^T @ inputs of a weight, from [tokens, out] and [tokens, in].

    Where Megatron-core's data parallelism has given the weight a buffer (`main_grad`) the product is added there, and
    autograd gets memory without content, because the hook that counts finished gradients asks for a tensor. The first
    product of a step finds the buffer zeroed and need not read it.
    """
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    if buffer is None:
        return grad_output.t() @ inputs
    add = add_product if weight.grad_added_to_main_grad else set_product  # type: ignore[attr-defined]
    add(buffer, grad_output.t(), inputs)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class FusedWeightGradient:
    """What Megatron-core calls where Apex's `fused_weight_gradient_mlp_cuda` is not installed."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """main_grad [out, in] += grad_output^T @ inputs, from [tokens, in] and [tokens, out]."""
        add_product(main_grad, grad_output.t(), inputs)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """The same into a buffer of half precision."""
        main_grad.addmm_(grad_output.t(), inputs)
