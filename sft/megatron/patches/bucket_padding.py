"""The resharding-safe checkpoint of a distributed optimizer, where gradient buffers have several buckets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBuffer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from sft.megatron.patches.patch import Patch

State = TypeVar("State")


def _at_padded_places(sharded_state: Callable[..., State]) -> Callable[..., State]:
    """Return `sharded_state` over a parameter state in which each bucket begins where it begins in the buffer."""

    @functools.wraps(sharded_state)
    def fixed(self: DistributedOptimizer, *args: object, **kwargs: object) -> State:
        gather = self.get_parameter_state_dp_zero

        def with_padding(**options: object) -> object:
            state = gather(**options)
            for index, buffer in enumerate(self.buffers if state is not None else []):
                for tensors in state[index].values():
                    for key in ("param", "exp_avg", "exp_avg_sq"):
                        tensors[key] = _spread(tensors[key], buffer)
            return state

        self.get_parameter_state_dp_zero = with_padding
        try:
            return sharded_state(self, *args, **kwargs)
        finally:
            del self.get_parameter_state_dp_zero

    return fixed


def _spread(joined: torch.Tensor, buffer: _ParamAndGradBuffer) -> torch.Tensor:
    """Return buckets that lie one behind the other, each at its place in the padded buffer."""
    spread = torch.zeros(buffer.numel, dtype=joined.dtype, device=joined.device)
    begin = 0
    for bucket in buffer.buckets:
        spread[bucket.offset : bucket.offset + bucket.numel_unpadded] = joined[begin : begin + bucket.numel_unpadded]
        begin += bucket.numel_unpadded
    return spread


def _apply() -> None:
    stock = DistributedOptimizer.sharded_param_state_fully_reshardable
    DistributedOptimizer.sharded_param_state_fully_reshardable = _at_padded_places(stock)


PATCH = Patch(
    name="bucket_padding",
    why="buckets are joined without the padding behind each, and parameters cut out of that by places that count the "
    "padding: all that lies behind a padded bucket is saved shifted, and loaded so without an error. Only runs with "
    "several buckets are hit, those that overlap the reduction of gradients",
    targets=(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
    ),
    test="parity/test_overlap.py::test_optimizer_state_of_padded_buckets_would_be_shifted",
    apply=_apply,
)
