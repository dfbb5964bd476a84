"""Megatron-core's column- and row-parallel linears with their products in fp8 (sft.kernels.fp8).

Parameters stay bf16 with fp32 master weights; fp8 lives within one product. What tensor parallel ranks tell each other
is bf16 and sent around the operation by Megatron-core's mappings, so that a gathered input is kept for the backward
pass instead of gathered again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from launcher.contract.errors import ModelError
from sft.kernels.linear import fp8_linear
from sft.megatron.core import TransformerBlockSubmodules, tensor_parallel

_LEAST = (8, 9)


class Fp8ColumnParallelLinear(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Rows of the weight split over tensor parallel ranks."""

    def whole_input(self, x: Tensor) -> Tensor:
        """`x` as all ranks of the group need it; its gradient is the sum of theirs."""
        if self.tp_group.size() == 1:
            return x
        if self.sequence_parallel:
            gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(x, group=self.tp_group)
            return gathered
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(x, group=self.tp_group)
        return copied

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Megatron-core's; on one tensor parallel rank the product of the very tensor, which may have its fp8 rows."""
        if self.tp_group.size() == 1 and self.bias is None:
            return fp8_linear(input_, self.weight), None
        found: tuple[Tensor, Tensor | None] = super().forward(input_, *args, **kwargs)
        return found

    def _forward_impl(self, input: Tensor, weight: Tensor, bias: Tensor | None, **_: Any) -> Tensor:
        summed = self.sequence_parallel or self.allreduce_dgrad  # what `forward` leaves to the product
        output = fp8_linear(self.whole_input(input) if summed else input, weight)
        return output if bias is None else output + bias


class Fp8RowParallelLinear(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Columns of the weight split over tensor parallel ranks."""

    def reduced(self, partial: Tensor) -> Tensor:
        """The sum over the group of what its ranks have computed."""
        if self.sequence_parallel:
            part: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
            return part
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole

    def _forward_impl(self, input: Tensor, weight: Tensor, **_: Any) -> Tensor:
        return fp8_linear(input, weight)


def use_fp8_linears(block: TransformerBlockSubmodules) -> None:
    """Let a decoder spec build its linears with products in fp8. The LM head keeps bf16."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < _LEAST:
        name, found = torch.cuda.get_device_name(), ".".join(map(str, torch.cuda.get_device_capability()))
        raise ModelError(
            f"train.precision fp8 needs compute capability 8.9 (Ada, Hopper or newer), and {name} has {found}; "
            "set it to bf16"
        )
    for layer in block.layer_specs:
        attention, mlp = layer.submodules.self_attention.submodules, layer.submodules.mlp.submodules
        attention.linear_qkv = mlp.linear_fc1 = Fp8ColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = Fp8RowParallelLinear
