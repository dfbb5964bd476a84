"""launcher logs: which files are printed, how ranks are told apart, and what the rank that failed first said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.errors import ConfigError, RunStateError
from launcher.contract.rundir import RunPaths
from launcher.runs.first_failure import last_words
from launcher.views import logs
from launcher.views.log_files import Choice, parse_ranks
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


def test_last_lines(failed: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """`--lines` was for JSON alone, and was ignored without it."""
    assert run("logs", str(failed.root), "--rank", "3", "-n", "2") == 0
    assert capsys.readouterr().out.splitlines() == _TRACEBACKS.splitlines()[-2:]
    run("logs", str(failed.root), "--rank", "1,2", "--lines", "1")
    assert capsys.readouterr().out.splitlines() == ["[rank 1] no end of line", "[rank 2] no end of line"]
    run("logs", str(failed.root), "--rank", "3", "-f", "-n", "1")
    assert capsys.readouterr().out.splitlines() == _TRACEBACKS.splitlines()[-1:]
    run("logs", str(failed.root), "-n", "1000000")
    assert capsys.readouterr().out == "hello from 0\nno end of line"


@pytest.mark.parametrize("words", [("-f", "--json"), ("-f", "--failed"), ("--failed", "-n", "3"), ("-n", "0")])
def test_options_of_which_one_would_be_ignored(
    failed: RunPaths, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    with pytest.raises((SystemExit, ConfigError)):
        run("logs", str(failed.root), *words)
    assert capsys.readouterr().out == ""


def test_a_rank_without_a_log_is_named(failed: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """It was told that the run had ended, and nothing of the rank."""
    run("logs", str(failed.root), "--rank", "99")
    assert capsys.readouterr().err.startswith("# no rank-99.log; run a: job 1 is FAILED")


@pytest.mark.parametrize("seconds", ["nan", "-1", "soon"])
def test_time_to_wait_is_a_number_of_seconds(failed: RunPaths, seconds: str) -> None:
    """Of `nan` seconds none was ever over."""
    with pytest.raises(SystemExit):
        run("wait", str(failed.root), f"--timeout={seconds}")


def test_nothing_failed(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    with pytest.raises(RunStateError, match="no rank of run a is known to have failed"):
        logs.choose(make_run(tmp_path, "a", job_id="1"), Choice(failed=True))


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
        parse_ranks(text)


def test_last_words_without_a_traceback(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    assert last_words(log) == "(no log rank-0.log)"
    log.write_text("\n".join(f"line {number}" for number in range(100)))
    assert last_words(log).splitlines() == [f"line {number}" for number in range(80, 100)]
