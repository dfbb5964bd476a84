"""Process groups: Megatron-core's for the model, and one over gloo for control messages.

The control group carries flags and error strings between ranks without touching the device, so that agreeing to
stop costs no GPU synchronisation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from launcher.contract.topology import Topology
from sft.megatron.core import parallel_state, tensor_parallel
from sft.megatron.patches.communicators import communicators_on_demand
from sft.models.weight_map import RankPlace

_DATA_RANK_SEED_STRIDE = 10_007
_STAGE_SEED_STRIDE = 100


def init_model_parallel(topology: Topology, seed: int) -> None:
    """Build Megatron-core's groups in the initialised world, and seed this rank's random generators.

    Tensor parallel ranks have the same dropout stream for replicated activations. Pipeline stages, data parallel and
    context parallel ranks have different ones.
    """
    with communicators_on_demand():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=topology.tensor_parallel,
            pipeline_model_parallel_size=topology.pipeline_parallel,
            virtual_pipeline_model_parallel_size=topology.virtual_pipeline if topology.virtual_pipeline > 1 else None,
            context_parallel_size=topology.context_parallel,
            expert_model_parallel_size=topology.expert_parallel,
            expert_tensor_parallel_size=topology.expert_tensor_parallel,
        )
    rank_seed = (
        seed
        + _STAGE_SEED_STRIDE * parallel_state.get_pipeline_model_parallel_rank()
        + _DATA_RANK_SEED_STRIDE * parallel_state.get_data_parallel_rank(with_context_parallel=True)
    )
    torch.manual_seed(rank_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(rank_seed)


def rank_place() -> RankPlace:
    """Return this rank's place in the groups that share parameters."""
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
    )
    tensor, experts, expert_tensor = ((group.rank(), group.size()) for group in groups)
    return RankPlace(tensor=tensor, experts=experts, expert_tensor=expert_tensor)


def sum_over(values: Tensor, group: dist.ProcessGroup) -> None:
    """Replace `values` on each rank by their sum over the group.

    A group of one is skipped: NCCL would build a communicator for it.
    """
    if group.size() > 1:
        dist.all_reduce(values, group=group)


T = TypeVar("T")


@contextlib.contextmanager
def node_ranks(ranks_per_node: int) -> Iterator[ControlGroup]:
    """Yield a group of the ranks of this node, of which each has as many, for the time of the block."""
    # All ranks make the groups of all nodes. With `use_local_synchronization`, by which each makes its own alone, two
    # pipeline stages of two tensor parallel ranks waited for each other for ever (test_families.py, tp2_pp2_plain).
    firsts = range(0, dist.get_world_size(), ranks_per_node)
    groups = [dist.new_group(list(range(first, first + ranks_per_node)), backend="gloo") for first in firsts]
    own = groups[dist.get_rank() // ranks_per_node]
    try:
        yield ControlGroup(own)
    finally:
        dist.destroy_process_group(own)


class ControlGroup:
    """Small messages between all ranks, or those of a group, over gloo."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._group = dist.new_group(backend="gloo") if group is None else group

    @property
    def rank(self) -> int:
        """This rank's place among those of the group."""
        return self._group.rank()

    @property
    def size(self) -> int:
        """The number of ranks."""
        return self._group.size()

    def any(self, flag: bool) -> bool:
        """Return whether it is true on any rank."""
        value = torch.tensor(int(flag))
        dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._group)
        return bool(value)

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """Return `any` of each flag, in one message."""
        values = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return [bool(value) for value in values]

    def total(self, number: int) -> int:
        """Return the sum over all ranks."""
        value = torch.tensor(number, dtype=torch.int64)
        dist.all_reduce(value, group=self._group)
        return int(value)

    def first_error(self, error: str | None) -> str | None:
        """Return the error of the lowest rank that has one, on every rank."""
        errors = self.gather(error)
        return next((f"rank {rank}: {text}" for rank, text in enumerate(errors) if text is not None), None)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank."""
        values = [value] * dist.get_world_size(self._group)  # placeholders, all of which are replaced
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_leader(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._group)
        return values[0]

    def exchange(self, sent: Tensor, to: int, received: Tensor, source: int) -> None:
        """Send one tensor in host memory while another is received. Empty ones are neither sent nor awaited."""
        pending = [dist.isend(sent, to, group=self._group)] if sent.numel() else []
        pending += [dist.irecv(received, source, group=self._group)] if received.numel() else []
        for each in pending:
            if each is not None:
                each.wait()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._group)
