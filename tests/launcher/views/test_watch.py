"""The table of runs: printed again when it changes, and cut to narrow terminals."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from launcher.__main__ import main
from launcher.contract.job_state import JobState
from launcher.runs.state import RunStatus, collect
from launcher.views import watch
from launcher.views.status_table import status_table
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import make_run


def test_watch_shows_changes_until_all_is_over(
    tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = FakeSlurm(commands)
    slurm.submit("a")
    make_run(tmp_path, "a", job_id="1")
    steps = iter([lambda: None, lambda: slurm.start("1"), lambda: slurm.end("1")])
    clock = SimpleNamespace(sleep=lambda _seconds: next(steps)(), strftime=time.strftime)
    monkeypatch.setattr(watch, "time", clock)  # a change between two looks, instead of a pause
    assert main(["--debug", "status", "--watch", "--run-root", str(tmp_path)]) == 0
    assert re.findall("PENDING|RUNNING|COMPLETED", capsys.readouterr().out) == ["PENDING", "RUNNING", "COMPLETED"]


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
    head, line = status_table([row], width).splitlines()
    assert max(len(head), len(line)) <= width
    assert line.startswith("llama-8b-chat  RUNNING  ")
    assert ("500/1000" in line) is (width >= 40)
    assert ("43.2%" in line) is (width >= 140)
    assert ("step-00000500" in line) is (width >= 140)
    assert line.endswith("…")


def test_expected_start_is_shown(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "echo '7|PENDING|Resources|2026-11-24T21:40:00|a'")
    rows, _ = collect([make_run(tmp_path, "a")])
    assert "Resources, expected to start 2026-11-24 21:40:00" in status_table(rows)
    assert rows[0].expected_start == "2026-11-24 21:40:00"
