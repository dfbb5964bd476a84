"""The one place that chooses the linears of a layer: plain or with products in fp8, with or without adapters."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from launcher.contract.spec import Fp8Spec
from sft.megatron.core import tensor_parallel
from sft.megatron.layers.fp8 import Fp8ColumnParallelLinear, Fp8RowParallelLinear, check_fp8_device
from sft.megatron.layers.lora import AdaptedColumn, AdaptedRow, AdaptedWhole
from sft.megatron.layers.mixture_of_experts import ExpertLinear, Fp8ExpertLinear
from sft.megatron.layers.whole_linear import WholeLinear


class LoraColumnParallelLinear(AdaptedColumn, tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Megatron-core's, with adapters."""


class LoraRowParallelLinear(AdaptedRow, tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Megatron-core's, with adapters."""


class LoraFp8ColumnParallelLinear(AdaptedColumn, Fp8ColumnParallelLinear):
    """The frozen product in fp8, adapters in bf16."""


class LoraFp8RowParallelLinear(AdaptedRow, Fp8RowParallelLinear):
    """The frozen product in fp8, adapters in bf16."""


class LoraWholeLinear(AdaptedWhole, WholeLinear):
    """The one that is not split, with adapters."""


@dataclass(frozen=True, slots=True)
class Linears:
    """The classes of a layer's linears."""

    column: type[nn.Module]
    """Of linear_qkv and linear_fc1."""
    row: type[nn.Module]
    """Of linear_proj and linear_fc2."""
    experts: type[ExpertLinear]
    """Of both, where the MLP is experts."""
    whole: type[WholeLinear]
    """Of latents; never in fp8."""


def choose_linears(*, fp8: Fp8Spec | None, adapted: bool) -> Linears:
    """Return the linears for these settings, or raise ModelError if the GPU cannot do them.

    `fp8` is None where no product is in fp8.
    """
    if fp8 is not None:
        check_fp8_device(experts=fp8.experts)
    column, row = {
        (False, False): (tensor_parallel.ColumnParallelLinear, tensor_parallel.RowParallelLinear),
        (False, True): (LoraColumnParallelLinear, LoraRowParallelLinear),
        (True, False): (Fp8ColumnParallelLinear, Fp8RowParallelLinear),
        (True, True): (LoraFp8ColumnParallelLinear, LoraFp8RowParallelLinear),
    }[fp8 is not None, adapted]
    experts = Fp8ExpertLinear if fp8 is not None and fp8.experts else ExpertLinear
    return Linears(column, row, experts, LoraWholeLinear if adapted else WholeLinear)
