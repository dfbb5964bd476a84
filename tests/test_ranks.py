"""The helper that runs functions on real ranks."""

from __future__ import annotations

import os
import signal
import socket
import warnings

import pytest
import torch
import torch.distributed as dist

import sft.engine.module
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


def leave_everything_behind() -> str:
    """Runs on a rank, and cleans up nothing."""
    os.environ["LEFT_BEHIND"] = "1"
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.filterwarnings("ignore", message="left behind")
    sft.engine.module.reduce_and_divide_gradients = leave_everything_behind  # type: ignore[assignment]
    return what_is_left()


def what_is_left() -> str:
    """Runs on a rank: the state that `leave_everything_behind` changes."""
    found = [
        "process group" if dist.is_initialized() else "",
        "variable" if "LEFT_BEHIND" in os.environ else "",
        "dtype" if torch.get_default_dtype() is not torch.float32 else "",
        "determinism" if torch.are_deterministic_algorithms_enabled() else "",
        "handler" if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL else "",
        "filter" if any("left behind" in str(entry[1]) for entry in warnings.filters) else "",
        "patch" if sft.engine.module.reduce_and_divide_gradients is leave_everything_behind else "",
    ]
    return " ".join(word for word in found if word)


def test_a_rank_leaves_nothing_to_the_next() -> None:
    all_of_it = "process group variable dtype determinism handler filter patch"
    assert run_ranks(2, leave_everything_behind, init=True) == [all_of_it] * 2
    assert run_ranks(2, what_is_left) == ["", ""]


def test_ranks_meet() -> None:
    assert run_ranks(3, sum_over_ranks, init=True) == [6, 6, 6]


def test_no_other_process_can_take_the_port_first() -> None:
    """Seen to fail: with a port that was only found free, nobody listens there before rank 0 does."""
    assert run_ranks(1, reach_the_rendezvous) == [True]
