"""Copies on two nodes of one rank each, without a training: what is kept, and what a fault on one node leaves.

tests/parity/test_memory_copies.py has trainings that go on from copies.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import sft.checkpoint.file_exchange
import sft.checkpoint.memory_copies
from sft.checkpoint.copy_choice import Choice
from sft.checkpoint.memory_copies import Made, MemoryCopies, NodePlace
from sft.megatron.parallel.groups import ControlGroup
from tests.ranks import run_ranks


def copies_on_two_nodes(memory: Path, attempt: str = "7.0", nodes: tuple[str, str] = ("a", "b")) -> MemoryCopies:
    """Runs on a rank: its copies, whose content is a tensor of its own."""
    rank = int(os.environ["RANK"])

    def state(module: Any, counters: Any) -> dict[str, torch.Tensor]:
        return {"tensor": torch.full((1000,), 10 * counters["step"] + rank)}

    sft.checkpoint.memory_copies.rank_state = state  # type: ignore[assignment]
    place = NodePlace(rank=rank, ranks_per_node=1, nodes=2, node=nodes[rank])
    copies = MemoryCopies(memory / nodes[rank], Path("/run"), place, ControlGroup(), attempt=attempt, identity="same")
    assert copies.open() is None
    return copies


def make(copies: MemoryCopies, step: int) -> Made | str:
    copies.make(step, cast("Any", None), {"step": step})
    return copies.outcome


def names(copies: MemoryCopies) -> list[str]:
    return sorted(path.name for path in copies.folder.glob("*.pt"))


def content(copies: MemoryCopies, step: int, rank: int) -> int:
    path = copies.folder / f"step-{step:08d}.rank-{rank:05d}.pt"
    return int(torch.load(path, weights_only=True)["tensor"][0])


def parts(*steps: int) -> list[str]:
    return [f"step-{step:08d}.rank-{rank:05d}.pt" for step in steps for rank in (0, 1)]


def keep_two(memory: Path) -> None:
    copies = copies_on_two_nodes(memory)
    for step, kept in ((2, (2,)), (4, (2, 4)), (6, (4, 6))):
        made = make(copies, step)
        assert isinstance(made, Made), made
        assert made.step == step
        assert names(copies) == parts(*kept)
    assert [content(copies, 6, rank) for rank in (0, 1)] == [60, 61]
    copies.remove()
    assert not copies.folder.exists()


def lose_the_folder(memory: Path) -> None:
    """As where a site removes a user's files."""
    copies = copies_on_two_nodes(memory)
    assert isinstance(make(copies, 2), Made)
    if os.environ["RANK"] == "1":
        shutil.rmtree(copies.folder)
    assert isinstance(make(copies, 4), Made)
    assert set(names(copies)) >= set(parts(4))
    if os.environ["RANK"] == "1":
        shutil.rmtree(copies.folder)
        copies.folder.symlink_to(memory)
    failed = make(copies, 6)
    assert isinstance(failed, str)
    assert failed.startswith("rank 1: ")
    if os.environ["RANK"] == "0":
        assert names(copies) == parts(2, 4)[2:]


def no_space(path: Path) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def fail_on_one_node(memory: Path) -> None:
    """The neighbour's part cannot be written: neither node counts the copy, and both keep the one before."""
    copies = copies_on_two_nodes(memory)
    assert isinstance(make(copies, 2), Made)
    open_new = sft.checkpoint.file_exchange.open_new
    if os.environ["RANK"] == "1":
        sft.checkpoint.file_exchange.open_new = no_space
    assert make(copies, 4) == f"rank 1: {memory}/b/step-00000004.rank-00000.pt: No space left on device"
    assert names(copies) == parts(2)
    sft.checkpoint.file_exchange.open_new = open_new
    assert isinstance(make(copies, 6), Made)
    assert names(copies) == parts(2, 6)
    found = copies_on_two_nodes(memory, "7.0-1").look(0)
    assert isinstance(found, Choice)
    assert (found.step, found.attempt) == (6, "7.0")


def go_on_elsewhere(memory: Path) -> None:
    """Rank 1's node is lost; its successor has nothing. What older ranks left there later makes no copy."""
    copies = copies_on_two_nodes(memory)
    make(copies, 2)
    make(copies, 4)
    following = copies_on_two_nodes(memory, "7.0-1", ("a", "c"))
    found = following.look(2)
    assert isinstance(found, Choice)
    assert (found.step, found.fetched) == (4, (1,))
    assert content(following, 4, 1) == 41
    assert names(following) == (parts(4) if os.environ["RANK"] == "0" else parts(4)[1:])
    assert following.look(4) == "the newest whole copy is of step 4, and a checkpoint of step 4"
    assert names(following) == []
    make(following, 4)
    again = copies_on_two_nodes(memory, "7.0-2", ("a", "b"))
    found = again.look(0)
    assert isinstance(found, Choice)
    assert (found.attempt, found.sources) == ("7.0-1", (0, 0))


@pytest.mark.parametrize("function", [keep_two, lose_the_folder, fail_on_one_node, go_on_elsewhere])
def test_copies_on_two_nodes(function: Any, tmp_path: Path) -> None:
    run_ranks(2, function, tmp_path, init=True)
