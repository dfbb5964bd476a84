"""The time to the first step: phase by phase in an event, as a log line, and as a number in progress.json."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_line, read_lines
from launcher.views.why import explain
from sft.runtime.start_clock import StartClock
from sft.training.trainer import train
from tests.parity.runs import copy_start, make_run
from tests.ranks import run_ranks
from tests.tiny_model import make_material

pytestmark = pytest.mark.parity

OWN = [
    *("imports", "data", "process groups", "weights", "optimizer"),
    *("start of the loop", "evaluation and first batch", "first step"),
]


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_material(tmp_path_factory.mktemp("material"), 16)


def train_after_a_script(config: Path, began: float) -> ExitCode:
    """Runs on a rank: training in a process that a batch script started, at `began`."""
    clock = StartClock.from_environ({"SFT_BEGAN_SCRIPT": str(began), "SFT_BEGAN_RANKS": str(began + 1)})
    clock.end("imports")
    return train(config, clock)


def first_steps(paths: RunPaths) -> list[dict[str, object]]:
    return [event for event in read_lines(paths.events) if event["event"] == "first_step"]


def test_each_attempt_tells_what_its_first_step_waited_for(tmp_path: Path, material: tuple[Path, Path]) -> None:
    """Of two ranks rank 0 tells; the attempt that goes on has loaded a checkpoint, and its only step no second."""
    settings = {"ranks": 2, "max_steps": 4, "every": 3}
    paths = make_run(tmp_path, *material, **settings)
    submitted = time.time() - 10.0
    append_line(paths.events, {"time": submitted, "event": "submitted", "job_id": "1", "scheduler": "local"})
    assert run_ranks(2, train_after_a_script, paths.config, submitted + 2.0) == [ExitCode.OK] * 2
    (told,) = first_steps(paths)
    phases = told["phases"]
    assert isinstance(phases, dict)
    assert list(phases) == ["queue", "script", "start of ranks", *OWN]
    assert (phases["queue"], phases["script"]) == (pytest.approx(2.0, abs=0.01), pytest.approx(1.0, abs=0.01))
    assert told["step"] == 1
    assert told["seconds"] == pytest.approx(sum(phases.values()))
    assert 0 <= told["warm_up"] <= phases["first step"]  # type: ignore[operator]
    assert json.loads(paths.progress.read_text())["first_step_seconds"] == told["seconds"]

    again = make_run(tmp_path, *material, name="again", **settings)
    copy_start(paths, again, 3)
    assert run_ranks(2, train, again.config) == [ExitCode.OK] * 2
    (told,) = first_steps(again)
    assert isinstance(told["phases"], dict)
    assert set(OWN) - set(told["phases"]) == {"imports"}
    assert "checkpoint" in told["phases"]
    assert told["step"] == 4 and "warm_up" not in told
    assert f"first step done {told['seconds']:.1f} s after submission: data" in explain(again)
