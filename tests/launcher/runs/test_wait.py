"""launcher wait: when it ends, with which exit code, and when it gives up."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.__main__ import main
from launcher.contract.errors import SchedulerError
from launcher.contract.exit_codes import ExitCode
from launcher.runs import wait as waiting
from launcher.runs.wait import wait
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import ended, make_run, started


@pytest.fixture
def slurm(commands: Commands) -> FakeSlurm:
    return FakeSlurm(commands)


def test_wait_is_over_when_all_runs_are(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.submit("a", "b")
    runs = [make_run(tmp_path, name, job_id=job) for name, job in (("a", "1"), ("b", "2"))]
    looks = 0

    def later(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        slurm.end(str(looks))

    monkeypatch.setattr(waiting, "time", SimpleNamespace(sleep=later, monotonic=time.monotonic))
    rows = wait(runs)
    assert rows is not None
    assert [row.state.value for row in rows] == ["COMPLETED", "COMPLETED"]
    assert (looks, slurm.questions) == (2, 3)


def test_wait_exits_as_the_runs_did(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    slurm.end("1", state="FAILED", exit_code="1:0")
    failed = make_run(tmp_path / "runs", "a", job_id="1")
    started(failed, "1.0", "1")
    ended(failed, 74, "1.0")
    assert main(["--debug", "wait", str(failed.root)]) == ExitCode.IO_ERROR
    slurm.submit("b", first=2)
    slurm.end("2")
    make_run(tmp_path / "runs", "b", job_id="2")
    assert main(["--debug", "wait", "--run-root", str(tmp_path / "runs"), "b"]) == ExitCode.OK
    assert main(["--debug", "wait", "--run-root", str(tmp_path / "runs"), "b", "a"]) == ExitCode.IO_ERROR
    slurm.end("2", state="TIMEOUT")
    assert main(["--debug", "wait", "--run-root", str(tmp_path / "runs"), "b"]) == ExitCode.FAILURE


def test_wait_gives_up_when_asked_to(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    paths = make_run(tmp_path, "a", job_id="1")
    assert main(["--debug", "wait", str(paths.root), "--timeout", "0"]) == ExitCode.TIMED_OUT


def test_wait_gives_up_on_a_state_that_stays_unknown(tmp_path: Path, slurm: FakeSlurm) -> None:
    paths = make_run(tmp_path, "a", job_id="1")
    with pytest.raises(SchedulerError, match="run a is UNKNOWN: Slurm no longer knows the job"):
        wait([paths], interval=0.0)
