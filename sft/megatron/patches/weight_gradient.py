"""Weight gradients added to fp32 buffers by the matrix product, where Apex's kernel is not installed."""

from __future__ import annotations

import megatron.core.tensor_parallel.layers as linears

from sft.kernels.weight_gradient import FusedWeightGradient
from sft.megatron.patches.patch import Patch


def _apply() -> None:
    if not linears._grad_accum_fusion_available:
        linears.fused_weight_gradient_mlp_cuda = FusedWeightGradient
        linears._grad_accum_fusion_available = True


PATCH = Patch(
    name="weight_gradient",
    why="Megatron-core's linears refuse to be built with gradient_accumulation_fusion, which fused kernels rest on",
    targets=("megatron.core.tensor_parallel.layers:_grad_accum_fusion_available",),
    test="sft/megatron/patches/test_class_patches.py::test_linears_would_refuse_fused_gradients",
    apply=_apply,
)
