"""Weight gradients, added to the weight's gradient buffer where it has one."""

from __future__ import annotations

from torch import Tensor

from sft.kernels.gradient_buffer import buffer_of
from sft.kernels.products import add_product


def weight_gradient(weight: Tensor, grad_output: Tensor, inputs: Tensor) -> Tensor:
    """Return what to give autograd as the gradient of `weight`, grad_output^T @ inputs.

    grad_output [tokens, out], inputs [tokens, in]. Where the weight has a gradient buffer, the product is added there
    and the returned tensor has the weight's shape but undefined content (sft.kernels.gradient_buffer).
    """
    buffer = buffer_of(weight)
    if buffer is None:
        return grad_output.t() @ inputs
    buffer.add_product(grad_output.t(), inputs)
    return buffer.answer()


class FusedWeightGradient:
    """Stand-in for Apex's module `fused_weight_gradient_mlp_cuda`, with the two functions Megatron-core calls."""

    @staticmethod
    def wgrad_gemm_accum_fp32(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add grad_output^T @ inputs to main_grad [out, in], from inputs [tokens, in] and grad_output [tokens, out]."""
        add_product(main_grad, grad_output.t(), inputs)

    @staticmethod
    def wgrad_gemm_accum_fp16(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
        """Add the same product to a buffer in half precision."""
        main_grad.addmm_(grad_output.t(), inputs)
