"""Weight gradients added to fp32 buffers by the matrix product itself.

The usual way writes the product in bf16, reads it again and adds it: three times the memory traffic, and one rounding
more. cuBLAS multiplies half precision factors into an fp32 result in one call, which torch offers from 2.8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to out [m, n], which is in fp32 or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


def set_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b to out [m, n], which is in fp32 or in the factors' type."""
    if a.is_cuda and a.dtype != out.dtype == torch.float32:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def weight_gradient(weight: Tensor, grad_output: Tensor, inputs: Tensor) -> Tensor:
    """Return what to give autograd as the gradient of `weight`, grad_output^T @ inputs.

    grad_output [tokens, out], inputs [tokens, in]. Where Megatron-core's data parallelism has given the weight a buffer
    (`main_grad`), the product is added there and the returned tensor has the weight's shape but undefined content.
    """
    buffer: Tensor | None = getattr(weight, "main_grad", None)
    if buffer is None:
        return grad_output.t() @ inputs
    # The buffer is zeroed when a step begins: overwriting it with the step's first product saves reading it.
    add = add_product if weight.grad_added_to_main_grad else set_product  # type: ignore[attr-defined]
    add(buffer, grad_output.t(), inputs)
    # Tells Megatron-core's hook not to add the returned tensor. The hook runs only if there is one, and must run: it
    # counts the finished gradients of a bucket.
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class FusedWeightGradient:
    """Stand-in for Apex's module `fused_weight_gradient_mlp_cuda`, with the two functions Megatron-core calls."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add grad_output^T @ inputs to main_grad [out, in]; inputs [tokens, in], grad_output [tokens, out]."""
        add_product(main_grad, grad_output.t(), inputs)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add the same product to a buffer in half precision."""
        main_grad.addmm_(grad_output.t(), inputs)
