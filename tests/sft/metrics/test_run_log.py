"""What a run that goes on says of metrics that are gone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from launcher.contract.errors import RunStateError
from launcher.contract.lease import Keeper, Owner, take
from launcher.contract.records import read_events, read_metrics
from launcher.contract.rundir import RunPaths, append_event, append_line, read_lines
from launcher.contract.spec import LoggingSpec, MetricsSpec, RunSpec
from launcher.views.why import explain
from sft.engine.results import StepResult
from sft.metrics.run_log import RunLog

SPEC = RunSpec(logging=LoggingSpec(every=5, tensorboard=False))


def lines(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in steps)


def resumed(paths: RunPaths, step: int) -> None:
    log = RunLog(paths, SPEC, attempt="a.1", max_steps=50, is_writer=True)
    log.begin(step, "a checkpoint")
    log.close()


def lost(paths: RunPaths) -> list[list[list[int]]]:
    return [event["steps"] for event in read_events(paths) if event["event"] == "metrics_lost"]


@pytest.mark.parametrize(
    ("text", "gaps"),
    [
        (lines(5, 10, 15, 20), []),
        (lines(5, 10, 15, 20, 25, 30), []),
        ("", [[0, 22]]),
        (None, [[0, 22]]),
        (lines(5, 10), [[10, 22]]),
        (lines(5) + '{"step": 10, "lo\n[]\n5\nnull\n{"step": "15"}\n' + lines(20), [[5, 20]]),
        (lines(5, 10, 15, 20).replace("5", "x"), [[0, 10], [10, 20]]),
    ],
)
def test_lines_that_are_gone_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, gaps: list[list[int]]
) -> None:
    """Emptied, deleted or garbled metrics were seen to be lost without a word, or to end in a traceback."""
    paths = RunPaths(tmp_path)
    append_event(paths, "training_started", step=0, max_steps=50)
    if text is not None:
        paths.metrics.write_text(text)
    resumed(paths, 22)
    assert lost(paths) == ([gaps] if gaps else [])
    said = capsys.readouterr().out
    assert ("has no line for steps" in said) == bool(gaps)
    assert ("metrics.jsonl has no line for steps" in explain(paths)) == bool(gaps)
    assert all(line["step"] <= 22 for line in read_metrics(paths))


@pytest.mark.parametrize(("step", "kept"), [(4, [0, 4]), (0, [])])
def test_what_is_done_again_is_written_once(step: int, kept: list[int], tmp_path: Path) -> None:
    """Seen to fail: answers of a step twice, after a restart from an older checkpoint, and those before the first one
    twice, with their evaluation, where no checkpoint had been saved."""
    paths = RunPaths(tmp_path)
    for at in (0, 4, 8):
        append_line(paths.metrics, {"step": at, "eval_loss": 1.0})
        append_line(paths.generations, {"step": at, "prompt": "a\u2028b", "output": "\ud83d"})
        append_line(paths.bad_steps, {"step": at, "reason": "spike"})
    with paths.generations.open("a") as file:
        file.write('{"step": 9, "pro')
    written = paths.generations.read_text()
    resumed(paths, step)
    for path in (paths.metrics, paths.generations, paths.bad_steps):
        assert [record["step"] for record in read_lines(path)] == kept
    assert written.startswith(paths.generations.read_text())


def test_a_run_that_begins_with_another_ones_checkpoint_has_lost_nothing(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    resumed(paths, 22)  # its first attempt
    assert lost(paths) == []
    resumed(paths, 22)
    paths.metrics.write_text(lines(25, 30))
    resumed(paths, 30)
    assert lost(paths) == []
    paths.metrics.write_text("")
    resumed(paths, 30)
    assert lost(paths) == [[[22, 30]]]


@pytest.mark.parametrize("place", ["true", "/proc/nowhere"])
def test_dashboards_get_the_newest_numbers(place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that cannot be written is reported once, and training goes on."""
    pytest.importorskip("prometheus_client")
    paths = RunPaths(tmp_path / "run")
    paths.root.mkdir()
    spec = RunSpec(name="run", run_root=str(tmp_path), metrics=MetricsSpec(prometheus=place))
    log = RunLog(paths, spec, attempt="a.1", max_steps=2, is_writer=True)
    log.begin(0, "nothing")
    log.metrics(step=0, eval_loss=4.5)
    for step in (1, 2):
        one = torch.tensor(float(step))
        counts = {"examples": 1, "tokens": 8, "squared_lengths": 64, "supervised_tokens": 8}
        log.step(StepResult(step=step, loss=one, grad_norm=one, bad=one, lr=0.1, **counts), 1.0, step)
    said = capsys.readouterr().out
    if place == "true":
        text = paths.prometheus.read_text()
        assert 'sft_loss{run="run"} 2.0\n' in text
        assert 'sft_eval_loss{run="run",set=""} 4.5\n' in text
    assert said.count("the file is no longer written") == (place != "true")


def test_what_another_attempt_has_is_not_written(tmp_path: Path) -> None:
    """A rank 0 that was taken for dead and goes on: neither metrics nor progress, nor the cut that a start makes."""
    paths = RunPaths(tmp_path)
    take(paths, Owner(attempt="7.0", job_id="7"))
    keeper = Keeper(paths, Owner(attempt="7.0", job_id="7"))
    log = RunLog(paths, SPEC, attempt="7.0", max_steps=50, is_writer=True, may_write=keeper.confirm)
    log.begin(0, "a model")
    log.metrics(step=5, loss=1.0)
    take(paths, Owner(attempt="7.0-1", job_id="7"))
    paths.metrics.write_text(lines(5, 10))
    for write in (lambda: log.begin(0, "a model"), lambda: log.metrics(step=6), lambda: log.checkpoint_saved("x")):
        log._record = {"step": 5}
        with pytest.raises(RunStateError, match=r"7\.0 writes no more"):
            write()
    assert paths.metrics.read_text() == lines(5, 10)
    assert not paths.progress.exists()
    log.close()


def test_a_restart_in_place_is_told_with_its_cost(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.metrics.write_text(lines(5, 10))
    fields = {"attempt": "7.0", "cause": "hang", "decision": "in_place", "reached": 10, "reached_at": 0.0}
    append_event(paths, "restart_decided", **fields, detail="x", exit_code=76, reason="y", nodes=["n1", "n3"])
    resumed(paths, 5)
    (told,) = [event for event in read_events(paths) if event["event"] == "restarted_in_place"]
    assert (told["after"], told["cause"], told["step"], told["steps_lost"]) == ("7.0", "hang", 5, 5)
    why = explain(paths)
    assert "decision: in place on n1, n3: y" in why
    assert re.search(r"the same job trains on: 5 steps to do again, \d+ s without training", why)
