"""Rows that expert parallel ranks send each other: what arrives, what comes back, and what is computed meanwhile."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from sft.kernels.autograd import Context
from sft.megatron.parallel import experts
from sft.megatron.parallel.experts import Exchange, plan_exchange
from tests.ranks import run_ranks

pytestmark = pytest.mark.parity

COUNTS = [[2, 0, 1, 3], [0, 0, 0, 0]]
"""Rows of each rank for each of four experts, of which each of two ranks holds two. The second rank has no tokens."""
order: list[str] = []


class _Meanwhile(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Context, x: Tensor) -> Tensor:
        order.append("forward")
        return x * 2

    @staticmethod
    def backward(ctx: Context, grad: Tensor) -> Tensor:
        order.append("backward")
        return grad * 2


def _note(name: str) -> None:
    inner = getattr(experts._Message, name)

    def noting(*args: object, **kwargs: object) -> object:
        order.append(name)
        return inner(*args, **kwargs)

    setattr(experts._Message, name, noting)


def _exchanged() -> tuple[list[float], list[float], list[float], list[str]]:
    rank = dist.get_rank()
    for name in ("start", "finish"):
        _note(name)
    counts = torch.tensor(COUNTS[rank])
    exchange: Exchange = plan_exchange(counts, dist.group.WORLD)  # type: ignore[arg-type]
    rows = (torch.arange(int(counts.sum())) + 10.0 * rank).unsqueeze(-1).requires_grad_()
    beside = torch.ones(1, requires_grad=True)
    sent = exchange.send(rows)
    doubled = _Meanwhile.apply(beside)  # type: ignore[no-untyped-call]
    arrived = sent.arrived()
    back = exchange.back(arrived * (exchange.experts + 1 + 2 * rank).unsqueeze(-1))
    (back.sum() + doubled.sum()).backward()
    assert rows.grad is not None
    return arrived.flatten().tolist(), back.flatten().tolist(), rows.grad.flatten().tolist(), order


def test_what_lies_between_sending_and_arriving_is_computed_meanwhile_in_both_directions() -> None:
    first, second = run_ranks(2, _exchanged, init=True)
    assert first[:3] == ([0.0, 1.0], [0.0, 1.0, 6.0, 12.0, 16.0, 20.0], [1.0, 1.0, 3.0, 4.0, 4.0, 4.0])
    assert second[:3] == ([2.0, 3.0, 4.0, 5.0], [], [])
    assert first[3] == second[3] == ["start", "forward", "finish", "start", "backward", "finish"]
