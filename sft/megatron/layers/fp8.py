"""Megatron-core's column- and row-parallel linears with their products in fp8 (sft.kernels.fp8).

Parameters stay bf16 with fp32 master weights; fp8 lives within one product. What tensor parallel ranks send each other
is bf16, and is sent around the operation by Megatron-core's mappings, so that a gathered input is kept for the backward
pass instead of gathered again.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from launcher.contract.errors import ModelError
from launcher.contract.spec import Fp8Spec
from sft.kernels.fp8 import WithRows, unquantized
from sft.kernels.linear import GradientForm, fp8_linear
from sft.megatron.core import tensor_parallel

_LEAST = (8, 9)
"""Compute capability from which on GPUs have products in fp8."""
_WITH_EXPERTS = ((9, 0), (10, 0))
"""Those for which torch has a grouped one."""

_OF_LINEAR_ATTENTION = {"in_proj": "qkv", "out_proj": "proj"}
"""The projections of linear attention, by the names that those of softmax attention have in the config."""


class Fp8Linear:
    """What both linears have in common: when their products are in fp8, and which."""

    training: bool
    gradients: GradientForm = "e4m3"
    """How gradients of outputs enter the products for gradients of inputs."""
    evaluates_in_fp8 = False

    @property
    def computes_in_fp8(self) -> bool:
        """Whether products are in fp8 now: in training and, if that is asked for, in evaluation mode."""
        return self.training or self.evaluates_in_fp8


def fp8_gradients(*linears: object) -> tuple[GradientForm, ...] | None:
    """Return how gradients enter the products of linears that compute in fp8 now, or None if they do not."""
    forms = tuple(each.gradients for each in linears if isinstance(each, Fp8Linear) and each.computes_in_fp8)
    return forms if len(forms) == len(linears) else None


def set_fp8_options(model_chunk: nn.Module, options: Fp8Spec) -> None:
    """Tell every linear of a chunk that has products in fp8 how they are to be computed."""
    for name, module in model_chunk.named_modules():
        if isinstance(module, Fp8Linear):
            own = name.rpartition(".")[2].removeprefix("linear_")
            in_bf16 = _OF_LINEAR_ATTENTION.get(own, own) in options.bf16_gradients
            module.gradients = "bf16" if in_bf16 else options.gradients
            module.evaluates_in_fp8 = options.evaluation


class Fp8ColumnParallelLinear(Fp8Linear, tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Rows of the weight split over tensor parallel ranks."""

    def whole_input(self, x: Tensor | WithRows) -> Tensor | WithRows:
        """Return `x` as all ranks of the group need it. Its gradient is the sum of theirs."""
        if self.tp_group.size() == 1:
            return x
        values = unquantized(x)
        if self.sequence_parallel:
            gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(values, group=self.tp_group)
            return gathered
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(values, group=self.tp_group)
        return WithRows(copied, x.rows) if isinstance(x, WithRows) else copied

    def forward(
        self, input_: Tensor | WithRows, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output, split over ranks, and the bias where it is added later."""
        if not self.computes_in_fp8:
            in_bf16: tuple[Tensor, Tensor | None] = super().forward(unquantized(input_), weight, runtime_gather_output)
            return in_bf16
        output = fp8_linear(self.whole_input(input_), self.weight, self.gradients)
        if self.bias is None or self.skip_bias_add:
            return output, self.bias
        return output + self.bias, None


class Fp8RowParallelLinear(Fp8Linear, tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Columns of the weight split over tensor parallel ranks."""

    def reduced(self, partial: Tensor) -> Tensor:
        """Return the sum over the group of what its ranks have computed."""
        if self.sequence_parallel:
            part: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
            return part
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole

    def _forward_impl(self, input: Tensor, weight: Tensor, **others: object) -> Tensor:
        if not self.computes_in_fp8:
            in_bf16: Tensor = super()._forward_impl(input=input, weight=weight, **others)
            return in_bf16
        return fp8_linear(input, weight, self.gradients)


def check_fp8_device(*, experts: bool = False) -> None:
    """Raise ModelError where the GPU has no products in fp8. A CPU computes them with the same rounding, for tests.

    Those of experts are fewer GPUs'.
    """
    if not torch.cuda.is_available():
        return
    found = torch.cuda.get_device_capability()
    has = f"{torch.cuda.get_device_name()} has {found[0]}.{found[1]}"
    if found < _LEAST:
        raise ModelError(
            f"train.precision fp8 needs compute capability 8.9 (Ada, Hopper or newer), and {has}; set it to bf16"
        )
    if experts and found not in _WITH_EXPERTS:
        raise ModelError(
            "train.fp8.experts needs torch's grouped product in fp8, which exists for compute capability 9.0 and 10.0 "
            f"(Hopper, Blackwell), and {has}; set it to false"
        )
