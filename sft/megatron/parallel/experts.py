"""Rows that expert parallel ranks send each other: each token to the ranks that hold its experts, and back.

The numbers of rows differ from step to step and from rank to rank, and may be zero. No row is dropped, and no rank may
leave out a call: the exchange is collective, also where a rank has no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft.megatron.core import parallel_state, tensor_parallel


def mark_as_experts(parameter: nn.Parameter, *, split: int | None) -> None:
    """Mark what a rank holds of experts, cut on axis `split`, as Megatron-core looks for it.

    It is then reduced over expert data parallel ranks, in buffers and an optimizer of its own. That holds under every
    topology, so that checkpoints of all have the same two optimizers. With `split` None the ranks that share each
    expert's matrices all hold the same, and the gradient norm takes that of the first.
    """
    counts = split is not None or parallel_state.get_expert_tensor_parallel_rank() == 0
    tensor_parallel.set_tensor_model_parallel_attributes(parameter, counts, split, 1)
    parameter.allreduce = False  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Exchange:
    """One exchange of rows between the ranks of a group, and its way back."""

    group: dist.ProcessGroup
    sent: list[int]
    """Rows for each rank."""
    received: list[int]
    """Rows from each rank."""
    experts: Tensor
    """For each received row its expert among those of this rank, [rows]."""

    def to_owners(self, rows: Tensor) -> Tensor:
        """Return the rows for this rank's experts, from the group's first rank to its last."""
        arrived: Tensor = tensor_parallel.all_to_all(self.group, rows, self.received, self.sent)
        return arrived

    def back(self, rows: Tensor) -> Tensor:
        """Return this rank's own rows, in the order in which it sent them."""
        arrived: Tensor = tensor_parallel.all_to_all(self.group, rows, self.sent, self.received)
        return arrived


def plan_exchange(counts: Tensor, group: dist.ProcessGroup) -> Exchange:
    """Return the exchange of rows that are sorted by expert, `counts` [experts] of them for each.

    A rank of the group holds an equal, contiguous part of the experts. The host waits once for the device, to learn the
    sizes of the messages.
    """
    ours = counts.view(group.size(), -1)
    theirs = torch.empty_like(ours)
    dist.all_to_all_single(theirs, ours, group=group)
    sent, received = torch.stack([ours.sum(1), theirs.sum(1)]).tolist()
    numbers = torch.arange(ours.size(1), device=counts.device).repeat(group.size())
    experts = numbers.repeat_interleave(theirs.flatten(), output_size=sum(received))
    return Exchange(group, sent, received, experts)
