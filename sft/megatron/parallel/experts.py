"""Rows that expert parallel ranks send each other: each token to the ranks that hold its experts, and back.

The numbers of rows differ from step to step and from rank to rank, and may be zero. No row is dropped, and no rank may
leave out a call: the exchange is collective, also where a rank has no tokens.

Rows on their way to the owners leave the ranks free to compute something else (`send`, then `Sent.arrived`). Their
gradients, on the way back, do too: autograd computes the latest operations first, so what was computed between sending
and arriving has its backward pass between the two as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sft.kernels.autograd import Context
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

    def send(self, rows: Tensor) -> Sent:
        """Send rows to the owners of their experts."""
        message = _Message(self)
        ticket: Tensor = _Send.apply(rows, message)  # type: ignore[no-untyped-call]
        return Sent(message, ticket)

    def back(self, rows: Tensor) -> Tensor:
        """Return this rank's own rows, in the order in which it sent them."""
        arrived: Tensor = tensor_parallel.all_to_all(self.group, rows, self.sent, self.received)
        return arrived


class _Message:
    """Rows under way, and later their gradients under way in the other direction."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._work: dist.Work | None = None
        self._buffers: tuple[Tensor, Tensor] | None = None

    def start(self, rows: Tensor, *, back: bool) -> None:
        exchange = self._exchange
        arriving, leaving = (exchange.sent, exchange.received) if back else (exchange.received, exchange.sent)
        rows = rows.contiguous()
        arrived = rows.new_empty(sum(arriving), *rows.shape[1:])
        self._work = dist.all_to_all_single(arrived, rows, arriving, leaving, group=exchange.group, async_op=True)
        self._buffers = arrived, rows  # neither may be freed before the exchange is over

    def finish(self) -> Tensor:
        """Wait for what is under way, on a GPU without making the host wait, and return it."""
        assert self._work is not None and self._buffers is not None
        self._work.wait()
        arrived = self._buffers[0]
        self._work = self._buffers = None
        return arrived


@dataclass(frozen=True, slots=True)
class Sent:
    """Rows under way to the owners of their experts."""

    _message: _Message
    _ticket: Tensor

    def arrived(self) -> Tensor:
        """Return the rows for this rank's experts, from the group's first rank to its last."""
        rows: Tensor = _Arrive.apply(self._ticket, self._message)  # type: ignore[no-untyped-call]
        return rows


class _MessageContext(Context, Protocol):
    message: _Message


class _Send(torch.autograd.Function):
    """Returns a ticket in place of rows: their gradient has the number of rows that were sent, not of those arrived."""

    @staticmethod
    def forward(ctx: _MessageContext, rows: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        message.start(rows, back=False)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: _MessageContext, _: Tensor) -> tuple[Tensor, None]:
        return ctx.message.finish(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: _MessageContext, ticket: Tensor, message: _Message) -> Tensor:
        ctx.message = message
        return message.finish()

    @staticmethod
    def backward(ctx: _MessageContext, grad: Tensor) -> tuple[Tensor, None]:
        ctx.message.start(grad, back=True)
        return grad.new_empty(0), None


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
