"""Weight gradients added to fp32 buffers by the matrix product itself.

Otherwise each is written in bf16, read, and added: three times the traffic, and a rounding in between. The product in
half precision with an fp32 result is one call of the GPU's library, and torch has it from 2.8 on.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b; out [m, n] in fp32."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.addmm_(a.to(out.dtype), b.to(out.dtype))


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
