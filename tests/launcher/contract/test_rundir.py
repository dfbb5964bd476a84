"""Run directories: whole files, whole lines, and which checkpoints are complete."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher.contract.rundir import (
    COMPLETE,
    RunPaths,
    append_event,
    checkpoint_step,
    read_json,
    read_lines,
    write_atomic,
    write_json,
)


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_modes(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "plain", "x")
        write_atomic(tmp_path / "script", "x", mode=0o755)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "plain").stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "script").stat().st_mode) == 0o755


def test_lines_cut_short_are_passed_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    append_event(paths, "submitted", job_id="7")
    with paths.events.open("a") as file:
        file.write('{"event": "attempt_st\n[1]\n')
    append_event(paths, "cancelled")
    assert [line["event"] for line in read_lines(paths.events)] == ["submitted", "cancelled"]
    assert list(read_lines(tmp_path / "absent")) == []
    assert read_json(tmp_path / "absent") is None


def test_complete_checkpoints_in_order(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert paths.complete_checkpoints() == []
    for step in (100_000_000, 20, 3):
        paths.checkpoint(step).mkdir(parents=True)
        (paths.checkpoint(step) / COMPLETE).touch()
    paths.checkpoint(30).mkdir()
    (paths.checkpoints / "step-00000040.tmp").mkdir()
    assert [checkpoint_step(path) for path in paths.complete_checkpoints()] == [3, 20, 100_000_000]
    with pytest.raises(ValueError, match="is not named step-<N>"):
        checkpoint_step(tmp_path)
