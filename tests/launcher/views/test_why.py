"""`status --why`: each event that matters is one line, a decision tells its cause, and strange events do no harm."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from launcher.contract.rundir import RunPaths, append_event
from launcher.views.why import decisions, explain


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "first")
    paths.root.mkdir()
    return paths


def told(run: RunPaths) -> list[str]:
    """What is told of the run's events, without their times."""
    title, *lines = explain(run).splitlines()
    assert title == "run first"
    times = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert all(re.match(rf"{times}  \S", line) or line.startswith(" " * 21) for line in lines), lines
    return [line[21:] for line in lines]


def test_history_of_a_run_that_was_started_again(run: RunPaths) -> None:
    append_event(run, "submitted", scheduler="slurm", job_id="7")
    append_event(run, "attempt_started", attempt="7.0", host="n1", nodes="n[1-2]")
    append_event(run, "training_started", attempt="7.0", step=0, max_steps=9)
    append_event(run, "stop_requested", attempt="7.0", step=4, deadline=True)
    append_event(run, "attempt_ended", attempt="7.0", exit_code=75)
    decision = {"cause": "bad_node", "detail": "shm", "decision": "requeue", "reason": "again", "exit_code": 75}
    append_event(run, "restart_decided", attempt="7.0", avoid=["n1"], budget=2, budget_left=1, **decision)
    append_event(run, "submitted", scheduler="slurm", job_id="8", by="7.0")
    append_event(run, "attempt_ended", attempt="8.0", exit_code=0)
    assert told(run) == [
        "submitted as slurm job 7",
        "attempt 7.0 started on n[1-2]",
        "training began after step 0 of 9",
        "stopped after step 4: the end of the job's time is near",
        "attempt 7.0 ended with exit code 75",  # once: told with its decision
        "cause: bad node (shm)",
        "decision: requeue, avoiding n1: again [1 of 2 restarts left]",
        "submitted as slurm job 8 by the run itself",
        "attempt 8.0 ended with exit code 0",
    ]
    assert [event["decision"] for event in decisions(run)] == ["requeue"]


def test_history_of_a_restart_in_place(run: RunPaths) -> None:
    decision = {"cause": "hang", "detail": "x", "decision": "in_place", "reason": "again", "exit_code": 76}
    nodes = [f"n{number}" for number in range(1, 13)]
    append_event(run, "restart_decided", attempt="7.0", nodes=nodes, budget=2, budget_left=1, **decision)
    append_event(run, "restarted_in_place", attempt="7.0-1", steps_lost=3, seconds_lost=41.7)
    append_event(run, "restarted_in_place", attempt="7.0-2")
    assert told(run)[2:] == [
        "decision: in place on n1, n2, n3, n4, n5, n6, n7, n8 and 4 more: again [1 of 2 restarts left]",
        "the same job trains on: 3 steps to do again, 42 s without training",
        "the same job trains on",
    ]


@pytest.mark.parametrize(
    ("event", "fields", "line"),
    [
        ("stop_requested", {"step": 1, "signal": "SIGUSR2"}, "stopped after step 1: asked by SIGUSR2"),
        ("stop_requested", {"step": 1}, "stopped after step 1: another rank was asked"),
        (
            "hang_detected",
            {"told_apart": True, "behind": [{"rank": 3, "host": "n2"}]},
            "no rank finished a step in time; behind: rank 3 on n2",
        ),
        ("copy_used", {"step": 48}, "goes on from the copy of step 48 in the nodes' memory"),
        ("copy_not_used", {"reason": "none is whole"}, "goes on from no copy in the nodes' memory: none is whole"),
        ("copy_failed", {"step": 48, "reason": "no space"}, "no copy of step 48 was made: no space"),
        ("copies_off", {"reason": "no room"}, "makes no copies: no room"),
        ("hang_detected", {"behind": []}, "no rank finished a step in time; behind: nobody in particular"),
        ("preflight_failed", {"nodes": [{"host": "n1"}, {"host": "n2"}]}, "preflight failed on n1, n2"),
        ("lease_taken_over", {"holder": "attempt 7.0"}, "took over the lease of attempt 7.0"),
        ("lease_refused", {"attempt": "9.0", "reason": "it is held"}, "attempt 9.0 refused to start: it is held"),
        ("cancelled", {"job_id": "7"}, "job 7 was cancelled by `launcher cancel`"),
        ("attempt_ended", {"attempt": "7.0", "exit_code": 0}, "attempt 7.0 ended with exit code 0"),
        (
            "attempt_ended",
            {"attempt": "7.0", "exit_code": 127},
            "attempt 7.0 ended with exit code 127 (a program was not found)",
        ),
        ("training_finished", {"step": 9}, "training finished after step 9"),
        ("training_finished", {}, "training_finished"),  # as another version may have written it
    ],
)
def test_one_line_an_event(run: RunPaths, event: str, fields: dict[str, object], line: str) -> None:
    append_event(run, event, **fields)
    append_event(run, "of no interest")
    assert told(run) == [line]


def test_an_attempt_that_ended_before_it_had_the_run_tells_its_cause(run: RunPaths) -> None:
    append_event(run, "attempt_ended", attempt="7.0", exit_code=127, detail="there is no command module on n1")
    assert told(run) == [
        "attempt 7.0 ended with exit code 127 (a program was not found)",
        "cause: there is no command module on n1",
    ]
