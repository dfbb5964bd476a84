"""Looking again and again, choosing runs, and the words of the rank that failed first."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.__main__ import main
from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest, write_manifest
from launcher.contract.rundir import RunPaths
from launcher.runs.first_failure import last_words
from launcher.runs.selection import Selection, parse_since, parse_states
from launcher.runs.state import RunStatus, collect
from launcher.views import logs, watch
from launcher.views.table import table
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import ended, make_run, started


@pytest.fixture
def slurm(commands: Commands) -> FakeSlurm:
    return FakeSlurm(commands)


@pytest.fixture
def failed(tmp_path: Path, slurm: FakeSlurm) -> RunPaths:
    """A run of 12 ranks of which rank 3 failed first."""
    slurm.submit("a")
    slurm.end("1", state="FAILED", exit_code="1:0")
    paths = make_run(tmp_path / "runs", "a", job_id="1")
    started(paths, "1.0", "1")
    ended(paths, 1, "1.0")
    folder = paths.logs / "1.0"
    folder.mkdir()
    (folder / "failure").write_text("1 3 node2\n")
    (folder / "batch.log").write_text("train\n")
    for rank in range(12):
        (folder / f"rank-{rank}.log").write_text(f"hello from {rank}\nno end of line")
    (folder / "rank-3.log").write_text(_TRACEBACKS)
    return paths


_TRACEBACKS = """\
step 6
Traceback (most recent call last):
  an earlier one that was caught
OSError: not this one
step 7
Traceback (most recent call last):
  File "data.py", line 1
KeyError: 'text'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "train.py", line 2
ValueError: row 7 has no text
"""


def run(*words: str) -> int:
    return main(["--debug", *words])


def sleeps(monkeypatch: pytest.MonkeyPatch, sleep: Callable[[float], None]) -> None:
    """Let `sleep` happen between two looks, instead of time."""
    clock = SimpleNamespace(sleep=sleep, monotonic=time.monotonic, strftime=time.strftime)
    monkeypatch.setattr(watch, "time", clock)


def test_wait_is_over_when_all_runs_are(tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.submit("a", "b")
    runs = [make_run(tmp_path, name, job_id=job) for name, job in (("a", "1"), ("b", "2"))]
    looks = 0

    def later(_seconds: float) -> None:
        nonlocal looks
        looks += 1
        slurm.end(str(looks))

    sleeps(monkeypatch, later)
    rows = watch.wait(runs)
    assert rows is not None
    assert [row.state.value for row in rows] == ["COMPLETED", "COMPLETED"]
    assert (looks, slurm.questions) == (2, 3)


def test_wait_exits_as_the_runs_did(failed: RunPaths, tmp_path: Path, slurm: FakeSlurm) -> None:
    ended(failed, 74, "1.0")
    assert run("wait", str(failed.root)) == ExitCode.IO_ERROR
    slurm.submit("b", first=2)
    slurm.end("2")
    make_run(tmp_path / "runs", "b", job_id="2")
    assert run("wait", "--run-root", str(tmp_path / "runs"), "b") == ExitCode.OK
    assert run("wait", "--run-root", str(tmp_path / "runs"), "b", "a") == ExitCode.IO_ERROR
    slurm.end("2", state="TIMEOUT")
    assert run("wait", "--run-root", str(tmp_path / "runs"), "b") == ExitCode.FAILURE


def test_wait_gives_up_when_asked_to(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    paths = make_run(tmp_path, "a", job_id="1")
    assert run("wait", str(paths.root), "--timeout", "0") == ExitCode.TIMED_OUT


def test_wait_does_not_wait_for_a_word_that_never_comes(tmp_path: Path, slurm: FakeSlurm) -> None:
    paths = make_run(tmp_path, "a", job_id="1")
    with pytest.raises(SchedulerError, match="run a is UNKNOWN: Slurm knows the job no more"):
        watch.wait([paths], interval=0.0)


def test_watch_shows_changes_until_all_is_over(
    tmp_path: Path, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.submit("a")
    make_run(tmp_path, "a", job_id="1")
    steps = iter([lambda: None, lambda: slurm.start("1"), lambda: slurm.end("1")])
    sleeps(monkeypatch, lambda _seconds: next(steps)())
    assert run("status", "--watch", "--run-root", str(tmp_path)) == 0
    assert re.findall("PENDING|RUNNING|COMPLETED", capsys.readouterr().out) == ["PENDING", "RUNNING", "COMPLETED"]


def test_logs_of_the_rank_that_failed_first(failed: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("logs", str(failed.root), "--failed") == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# rank 3 on node2 failed first, with exit code 1:\nTraceback")
    assert shown.endswith("ValueError: row 7 has no text\n")
    assert "KeyError: 'text'" in shown
    assert "not this one" not in shown


def test_following_ends_with_the_words_of_the_rank_that_failed_first(
    failed: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("logs", str(failed.root), "-f") == 1
    shown = capsys.readouterr().out
    assert shown.index("hello from 0") < shown.index("rank 3 on node2 failed first")
    run("logs", str(failed.root), "-f", "--rank", "3")
    assert "failed first" not in capsys.readouterr().out  # the traceback itself was shown


def test_nothing_failed(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    with pytest.raises(RunStateError, match="no rank of run a is known to have failed"):
        logs.show(make_run(tmp_path, "a", job_id="1"), logs.Choice(failed=True))


def test_ranks_are_told_apart(failed: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    run("logs", str(failed.root), "--rank", "10,1-2")
    assert capsys.readouterr().out.splitlines() == [
        "[rank 10] hello from 10",
        "[rank 10] no end of line",
        "[rank 1] hello from 1",
        "[rank 1] no end of line",
        "[rank 2] hello from 2",
        "[rank 2] no end of line",
    ]
    run("logs", str(failed.root), "--all")
    ranks = re.findall(r"(?m)^\[rank (\d+)\] hello", capsys.readouterr().out)
    assert ranks == [str(rank) for rank in range(12) if rank != 3]
    run("logs", str(failed.root), "--rank", "1")
    assert capsys.readouterr().out == "hello from 1\nno end of line"


@pytest.mark.parametrize("text", ["", "a", "1-", "3-1", "1,,2", "-1", "9999999"])
def test_ranks_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match=r"write numbers and ranges, e\.g\. 0,3-5"):
        logs.parse_ranks(text)


def test_last_words_without_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    assert last_words(log) == "(no log rank-0.log)"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    assert last_words(log).splitlines() == [f"line {number}" for number in range(80, 100)]


def test_selection(tmp_path: Path, slurm: FakeSlurm, capsys: pytest.CaptureFixture[str]) -> None:
    jobs = slurm.submit("llama-1", "llama-2", "qwen")
    for name, job in zip(("llama-1", "llama-2", "qwen"), jobs, strict=True):
        make_run(tmp_path, name, job_id=job)
    slurm.start("1")

    def shown(*words: str) -> list[str]:
        run(words[0], "--run-root", str(tmp_path), *words[1:])
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]]

    assert shown("status", "--name", "llama-*") == ["llama-1", "llama-2"]
    assert shown("status", "--state", "pending") == ["llama-2", "qwen"]
    assert shown("status", "--state", "pending,running", "--name", "*-1") == ["llama-1"]
    assert shown("list", "--since", "1d") == []  # made in 1970
    assert shown("list", "--since", "1970-01-01", "--name", "qwen") == ["qwen"]
    assert shown("list", "--state", "failed") == []
    qwen = RunPaths(tmp_path / "qwen")
    write_manifest(qwen, dataclasses.replace(read_manifest(qwen), group="sweep"))
    assert shown("list", "--group", "sweep") == shown("status", "--group", "sweep") == ["qwen"]


def test_bad_selections() -> None:
    with pytest.raises(ConfigError, match="--state RUNING: no such state; did you mean 'RUNNING'"):
        parse_states(["pending,runing"])
    with pytest.raises(ConfigError, match="--since yesterday: write how long ago"):
        parse_since("yesterday")
    assert abs(parse_since("2h") - (time.time() - 7200)) < 5
    assert Selection().fits(JobState.UNKNOWN)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_narrow_terminals(width: int) -> None:
    row = RunStatus(
        run="llama-8b-chat",
        directory="/r",
        state=JobState.RUNNING,
        attempt="1234567.0",
        job="1234567",
        step=500,
        max_steps=1000,
        loss=1.2345,
        tokens_per_second=54321.0,
        mfu=0.4321,
        eta_seconds=3725,
        checkpoint="step-00000500",
        reason="training, which goes on and on and on and on and on and on",
    )
    head, line = table([row], width).splitlines()
    assert max(len(head), len(line)) <= width
    assert line.startswith("llama-8b-chat  RUNNING  ")
    assert ("500/1000" in line) is (width >= 40)
    assert ("43.2%" in line) is (width >= 140)
    assert ("step-00000500" in line) is (width >= 140)
    assert line.endswith("…")


def test_expected_start_is_shown(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "echo '7|PENDING|Resources|2026-11-24T21:40:00|a'")
    rows, _ = collect([make_run(tmp_path, "a")])
    assert "Resources, expected to start 2026-11-24 21:40:00" in table(rows)
    assert rows[0].as_json()["expected_start"] == "2026-11-24 21:40:00"
