"""Ranks of a node read each byte of the weights once, together: counted by the kernel, in files that are not cached."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import sft.engine.module
import sft.megatron.initial_weights
from sft.engine.module import SFTGPT
from sft.hf.read_ahead import PIECE, joined, pieces, read_ahead
from sft.training.trainer import train
from tests.parity.runs import make_run
from tests.ranks import run_ranks
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

A, B = Path("a"), Path("b")


def test_ranges_become_one_where_they_touch() -> None:
    assert joined([(B, 5, 9), (A, 0, 4), (A, 4, 6), (A, 5, 8), (A, 9, 9)]) == [(A, 0, 8), (A, 9, 9), (B, 5, 9)]


@pytest.mark.parametrize("shares", [1, 2, 3, 8, 50])
def test_shares_are_every_byte_once(shares: int) -> None:
    ranges = [(A, 100, 100 + 7 * PIECE + 3), (B, 0, 10)]
    every = [piece for share in range(shares) for piece in pieces(ranges, share, shares)]
    assert joined(every) == ranges
    assert sum(end - begin for _, begin, end in every) == sum(end - begin for _, begin, end in ranges)
    assert all(0 < end - begin <= PIECE for _, begin, end in every)


def forget(path: Path) -> None:
    """Take a file out of the page cache."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


def bytes_from_disk() -> int:
    """What this process has had the disk read."""
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("read_bytes"))


@pytest.fixture
def uncached(tmp_path: Path) -> Path:
    """A file whose bytes are on the disk alone."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2 * PIECE))
    forget(path)
    before = bytes_from_disk()
    path.read_bytes()
    if bytes_from_disk() - before < 2 * PIECE:
        pytest.skip("the kernel does not count what is read of this file system")
    forget(path)
    return path


def test_what_is_cached_is_not_read_again(uncached: Path) -> None:
    ranges = [(uncached, 0, 2 * PIECE)]
    assert PIECE <= read_ahead(ranges, 0, 1) <= 2 * PIECE  # the kernel may keep a page that it was asked to forget
    assert read_ahead(ranges, 0, 1) == 0


def test_a_file_that_cannot_be_read_is_left_to_who_needs_it(tmp_path: Path) -> None:
    assert read_ahead([(tmp_path / "none", 0, 10)], 0, 1) == 0


class _Enough(Exception):
    """The weights are loaded."""


def count_while_loading(config: Path, together: bool) -> tuple[int, list[float]]:
    """Runs on a rank: what it had the disk read while it filled its parameters, and some of their values."""
    load = sft.engine.module.load_initial_weights
    found: list[Any] = []
    if not together:
        sft.megatron.initial_weights.read_ahead = lambda *_: 0

    def counted(model_chunks: Any, *args: Any, **kwargs: Any) -> None:
        before = bytes_from_disk()
        load(model_chunks, *args, **kwargs)
        found.append(bytes_from_disk() - before)
        found.append([float(parameter.double().sum()) for parameter in model_chunks[0].parameters()])

    def enough(self: SFTGPT) -> None:
        raise _Enough

    sft.engine.module.load_initial_weights = counted  # type: ignore[assignment]
    SFTGPT.wrap_chunks = enough  # type: ignore[method-assign]
    with pytest.raises(_Enough):
        train(config)
    return found[0], found[1]


def test_a_node_reads_each_byte_once_and_each_rank_its_share(uncached: Path, tmp_path: Path) -> None:
    """Two replicas of two tensor parallel ranks. Seen to fail without reading ahead: some ranks then read nothing.

    Values are those that the ranks read by themselves.
    """
    model = make_tiny_model(tmp_path / "model", heads=32)
    weights = model / "model.safetensors"
    chat = write_jsonl(tmp_path / "chat.jsonl", make_chat_rows(8, seed=3))
    paths = make_run(tmp_path, model, chat, ranks=4, topology={"tensor_parallel": 2})
    alone = run_ranks(4, count_while_loading, paths.config, False)
    forget(weights)
    found = run_ranks(4, count_while_loading, paths.config, True)
    assert [values for _, values in found] == [values for _, values in alone]
    size = weights.stat().st_size
    assert size > 9 * PIECE
    counts = [count for count, _ in found]
    assert 0.7 * size < sum(counts) < 1.05 * size
    assert min(counts) > 0.1 * size
