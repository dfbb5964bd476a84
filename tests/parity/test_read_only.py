"""Folders that may not be written: exit code 74, and the path that it is about."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from sft.__main__ import main
from tests.parity.runs import make_run, run_training
from tests.ranks import run_ranks
from tests.tiny_model import make_chat_rows, make_tiny_model, write_jsonl

pytestmark = pytest.mark.parity


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[None]:
    """Nobody may write to a folder, not even root."""
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("a file system that is read-only for its owner needs root on Linux")
    if subprocess.run(["mount", "--bind", str(path), str(path)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(path)], check=True, capture_output=True)
        yield
    finally:
        subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    model = make_tiny_model(tmp_path / "model", layers=1)
    rows = write_jsonl(tmp_path / "train.jsonl", make_chat_rows(16, 1))
    return make_run(tmp_path / "runs", model, rows, ranks=1, max_steps=2)


def called(command: str, config: Path, log: Path) -> int:
    """Runs on a rank: the exit code of a command, with what it says in a file."""
    with log.open("w") as file, contextlib.redirect_stderr(file):
        return main([command, str(config)])


def expect_io_error(command: str, run: RunPaths, log: Path, names: str) -> None:
    assert run_ranks(1, called, command, run.config, log) == [ExitCode.IO_ERROR]
    said = log.read_text()
    assert "Read-only file system" in said
    assert names in said
    assert "Traceback" not in said


def test_a_cache_that_may_not_be_written(run: RunPaths, tmp_path: Path) -> None:
    cache = run.root.parent / ".cache"
    cache.mkdir()
    with read_only(cache):
        expect_io_error("prepare", run, tmp_path / "said", str(cache))
    assert run_ranks(1, called, "prepare", run.config, tmp_path / "said") == [ExitCode.OK]
    with read_only(cache):  # all is there: a shared cache of somebody else's need not be written
        assert run_ranks(1, called, "prepare", run.config, tmp_path / "said") == [ExitCode.OK]


def test_a_run_directory_that_may_not_be_written(run: RunPaths, tmp_path: Path) -> None:
    """Where the lease, the metrics and the checkpoints go."""
    assert run_ranks(1, called, "prepare", run.config, tmp_path / "said") == [ExitCode.OK]
    with read_only(run.root):
        expect_io_error("train", run, tmp_path / "said", str(run.root))
    run_training(run, 1)
