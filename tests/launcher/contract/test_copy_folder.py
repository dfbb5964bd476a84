"""Folders in a node's memory for copies of runs' states: whose they are, and when they go."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from launcher.contract import copy_folder as folders
from launcher.contract.copy_folder import copy_folder, make_copy_folder, remove_stale_copies, start_of
from launcher.contract.lease import Owner, release, take
from launcher.contract.rundir import RunPaths


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "shm"
    place.mkdir()
    monkeypatch.setattr(folders, "MEMORY", place)
    return place


def a_run(tmp_path: Path, name: str, attempt: str | None) -> RunPaths:
    """A run that an attempt holds, or none."""
    paths = RunPaths(tmp_path / name)
    paths.root.mkdir()
    if attempt is not None:
        take(paths, Owner(attempt=attempt, job_id=attempt.partition(".")[0]))
    return paths


def copies_of(paths: RunPaths, start: str, node: str = "node1") -> Path:
    folder = copy_folder(paths.root, start, node)
    make_copy_folder(folder, paths.root)
    (folder / "step-00000002.rank-00000.pt").write_bytes(b"tensors")
    return folder


def test_a_start_of_a_job_is_the_same_for_all_attempts_in_place() -> None:
    assert [start_of(name) for name in ("7.0", "7.0-3", "7_4.2-1")] == ["7.0", "7.0", "7_4.2"]
    assert [start_of(name) for name in ("by-hand", "local-3")] == [None, None]


def test_a_folder_is_of_one_user_start_run_and_node(memory: Path) -> None:
    names = {
        copy_folder(Path(run), start, node).name
        for run in ("/runs/a", "/runs/b")
        for start in ("7.0", "7.1")
        for node in ("node1", "node2")
    }
    assert len(names) == 8
    assert all(name.startswith(f"sft-copies-{os.getuid()}-7.") for name in names)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_nobody_else_can_enter_it_under_any_umask(umask: int, tmp_path: Path, memory: Path) -> None:
    before = os.umask(umask)
    try:
        folder = copies_of(a_run(tmp_path, "run", "7.0"), "7.0")
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_what_others_planted_in_its_place_is_not_used(tmp_path: Path, memory: Path) -> None:
    paths, elsewhere = a_run(tmp_path, "run", "7.0"), tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    link = copy_folder(paths.root, "7.0", "node1")
    link.symlink_to(elsewhere)
    open_to_all = copy_folder(paths.root, "7.0", "node2")
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    for planted in (link, open_to_all):
        with pytest.raises(PermissionError, match="belongs to somebody else, or others can enter it"):
            make_copy_folder(planted, paths.root)
    assert not list(elsewhere.iterdir())
    release(paths, Owner(attempt="7.0", job_id="7"))
    remove_stale_copies()
    assert elsewhere.is_dir()
    assert link.is_symlink()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to somebody else")
def test_a_folder_of_another_user_is_not_used(tmp_path: Path, memory: Path) -> None:
    paths = a_run(tmp_path, "run", "7.0")
    folder = copy_folder(paths.root, "7.0", "node1")
    folder.mkdir(mode=0o700)
    os.chown(folder, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to somebody else"):
        make_copy_folder(folder, paths.root)


def test_copies_go_once_nobody_can_go_on_from_them(tmp_path: Path, memory: Path) -> None:
    """The run is over, another job has it, or the job was started anew: then its copies are of an older start."""
    over = copies_of(a_run(tmp_path, "over", None), "7.0")
    taken = copies_of(a_run(tmp_path, "taken", "8.0"), "7.0")
    requeued = copies_of(a_run(tmp_path, "requeued", "7.1"), "7.0")
    gone = copies_of(RunPaths(tmp_path / "gone"), "7.0")
    held = copies_of(a_run(tmp_path, "held", "7.0-2"), "7.0")
    unknown = copies_of(a_run(tmp_path, "unknown", None), "7.0")
    (tmp_path / "unknown" / "lease.json").write_text("")
    begun = copy_folder(Path("/runs/begun"), "7.0", "node1")
    begun.mkdir(mode=0o700)
    remove_stale_copies()
    assert [path.is_dir() for path in (over, taken, requeued, gone)] == [False] * 4
    assert [path.is_dir() for path in (held, unknown, begun)] == [True] * 3


def test_folders_of_other_names_stay(memory: Path) -> None:
    (memory / f"sft-copies-{os.getuid()}-else").mkdir(mode=0o700)
    (memory / f"sft-copies-{os.getuid()}-else" / "run").write_text("/nowhere")
    remove_stale_copies()
    assert list(memory.iterdir())
