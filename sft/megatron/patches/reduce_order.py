"""Sums over tensor parallel ranks of tensors whose elements are in another order in memory, as of a transposed one."""

from __future__ import annotations

import megatron.core.tensor_parallel.mappings as mappings
import torch.distributed as dist
from torch import Tensor

from sft.megatron.patches.patch import Patch


def summed(input_: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the sum over the group, in the memory of `input_` where that is in order."""
    if group.size() == 1:
        return input_
    whole = input_.contiguous()
    dist.all_reduce(whole, group=group)
    return whole


def _apply() -> None:
    mappings._reduce = summed


PATCH = Patch(
    name="reduce_order",
    why="the sum is taken in a copy that is in order, and the tensor itself is returned: this rank's part in place of "
    "the sum, without an error",
    targets=("megatron.core.tensor_parallel.mappings:_reduce",),
    test="sft/megatron/patches/test_reduce_order.py::test_a_transposed_tensor_is_summed",
    apply=_apply,
)
