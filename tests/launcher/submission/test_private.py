"""What other users of the machine can do to a run: nothing, whatever the umask, links and races."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.private_folder import private_folder
from launcher.contract.rundir import RunPaths
from launcher.submission import directory
from launcher.submission.claim import LOCK_FILE, claim
from tests.launcher.conftest import Commands

RUN = RunPaths(Path("runs/first"))


@pytest.fixture
def umask() -> Iterator[None]:
    """The process's umask is what it was after the test."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_a_run_is_the_users_alone_under_any_umask(
    workdir: Path, commands: Commands, umask: None, monkeypatch: pytest.MonkeyPatch, mask: int
) -> None:
    commands.add("srun", "")
    commands.add("sbatch", "echo 7")
    commands.add("squeue", "")
    monkeypatch.setenv("A_TOKEN", "secret")
    os.umask(mask)
    words = ["env_from=[A_TOKEN]", "cluster.secrets_dir=private"]
    assert main(["submit", "cfg.yaml", "--cluster=slurm-dev", *words]) == ExitCode.OK
    assert stat.S_IMODE(RUN.root.stat().st_mode) == 0o700
    assert stat.S_IMODE(Path("private").stat().st_mode) == 0o700
    assert [stat.S_IMODE(path.stat().st_mode) for path in Path("private").iterdir()] == [0o600]


def test_a_link_that_appears_between_look_and_use_is_not_followed(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another user, in a run root that others may write to, is quicker than the launcher's own mkdir."""
    elsewhere = workdir / "elsewhere"
    elsewhere.mkdir()
    looked = directory._is_foreign

    def look_then_lose_the_race(root: Path) -> bool:
        foreign = looked(root)
        if not root.parent.exists():
            root.parent.mkdir()
            root.symlink_to(elsewhere)
        return foreign

    monkeypatch.setattr(directory, "_is_foreign", look_then_lose_the_race)
    assert main(["submit", "cfg.yaml"]) == ExitCode.CONFLICT
    assert "run first exists" in capsys.readouterr().err
    assert {path.name for path in elsewhere.iterdir()} <= {LOCK_FILE}


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder to another user")
def test_a_folder_of_another_user_is_no_run_directory(workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RUN.root.mkdir(parents=True)
    (RUN.root / LOCK_FILE).touch()
    os.chown(RUN.root, 12345, 12345)
    assert main(["submit", "cfg.yaml"]) == ExitCode.CONFLICT
    capsys.readouterr()


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK_FILE).symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"), claim(tmp_path / "run"):
        pass
    assert not (tmp_path / "victim").exists()


@pytest.mark.parametrize("planted", ["link", "open", "file"])
def test_what_others_planted_in_tmp_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    own = private_folder()
    assert own is not None
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.rmdir()
    if planted == "link":
        (tmp_path / "theirs").mkdir(mode=0o700)
        own.symlink_to(tmp_path / "theirs")
    elif planted == "open":
        own.mkdir()
        own.chmod(0o777)
    else:
        own.touch()
    assert private_folder() is None
