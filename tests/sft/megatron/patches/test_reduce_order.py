"""What tensor parallel ranks add up."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sft.megatron.core import tensor_parallel
from tests.ranks import run_ranks

pytestmark = pytest.mark.parity


def test_a_transposed_tensor_is_summed() -> None:
    """Forward and backward. Seen to fail: each rank got its own part back."""
    expected = (3 * torch.arange(6.0).view(2, 3)).tolist()
    assert run_ranks(2, sums, init=True) == [(expected, expected)] * 2


def sums() -> tuple[object, object]:
    """Runs on a rank: the sum of tensors, of which the second rank's is twice the first's, and of gradients."""
    own = torch.arange(6.0).view(2, 3) * (1 + dist.get_rank())
    in_order = own.t().contiguous()
    group = dist.group.WORLD
    whole = tensor_parallel.reduce_from_tensor_model_parallel_region(in_order.t(), group=group)
    source = torch.zeros(2, 3, requires_grad=True)
    tensor_parallel.copy_to_tensor_model_parallel_region(source, group=group).backward(in_order.t())
    assert source.grad is not None
    return whole.tolist(), source.grad.tolist()
