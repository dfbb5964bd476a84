"""The helper that runs functions on real ranks."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist

from tests.ranks import run_ranks

pytestmark = pytest.mark.parity


def sum_over_ranks() -> int:
    """Runs on a rank."""
    value = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(value)
    return int(value)


def reach_the_rendezvous() -> bool:
    """Runs on a rank, before anything of torch.distributed is started."""
    with socket.create_connection((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))):
        return True


def test_ranks_meet() -> None:
    assert run_ranks(3, sum_over_ranks, init=True) == [6, 6, 6]


def test_no_other_process_can_take_the_port_first() -> None:
    """Seen to fail: with a port that was only found free, nobody listens there before rank 0 does."""
    assert run_ranks(1, reach_the_rendezvous) == [True]
