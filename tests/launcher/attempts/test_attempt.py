"""The end of an attempt as the batch script calls it: what the run's directory says of progress."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.attempts.attempt import main
from launcher.contract.rundir import COMPLETE, RunPaths, append_event
from launcher.contract.spec import ClusterSpec, RunSpec, sealed


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.logs.mkdir(parents=True)
    paths.config.write_text(sealed(RunSpec(name="run", cluster=ClusterSpec(name="c", scheduler="slurm"))))
    return paths


def end_of_attempt(run: RunPaths, number: int, step: int, capsys: pytest.CaptureFixture[str]) -> str:
    """An attempt that stopped in time before the end of its job; return the first word for the shell."""
    attempt = f"7.{number}"
    words = [str(run.root), "--attempt", attempt, "--job-id", "7", "--pid", str(os.getpid()), "--cluster", "far"]
    assert main(["begin", *words]) == 0
    append_event(run, "attempt_started", attempt=attempt, job_id="7")
    run.checkpoint(step).mkdir(parents=True)
    (run.checkpoint(step) / COMPLETE).touch()
    append_event(run, "stop_requested", attempt=attempt, step=step, deadline=True)
    capsys.readouterr()
    assert main(["end", *words, "--exit-code", "75"]) == 0
    return capsys.readouterr().out.split()[0]


@pytest.mark.handmade_records
def test_a_step_an_attempt_is_no_progress(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """As where a deadline lies in the past: each attempt trains one step, saves it and stops."""
    answers = [end_of_attempt(run, number, step=1 + number, capsys=capsys) for number in range(4)]
    assert answers == ["requeue", "requeue", "requeue", "stop"]


@pytest.mark.handmade_records
def test_two_steps_are(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    answers = [end_of_attempt(run, number, step=2 + 2 * number, capsys=capsys) for number in range(6)]
    assert answers == ["requeue"] * 6
