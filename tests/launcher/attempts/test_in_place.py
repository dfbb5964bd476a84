"""Restarts in place: which nodes follow, what the batch script is told, and who may write from then on."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.attempts.attempt import main
from launcher.attempts.cause import Cause, Diagnosis
from launcher.attempts.in_place import Allocation, bad_nodes, next_nodes, with_silent_nodes
from launcher.contract.errors import RunStateError
from launcher.contract.lease import Keeper, Owner, holder
from launcher.contract.records import read_events
from launcher.contract.restart_cost import restart_cost
from launcher.contract.rundir import COMPLETE, RunPaths, append_event, append_line
from launcher.contract.spec import ClusterSpec, ResourcesSpec, RestartSpec, RunSpec, sealed

FOUR = ("n1", "n2", "n3", "n4")


@pytest.mark.parametrize(
    ("usable", "used", "avoid", "draining", "chosen"),
    [
        ("n1 n2 n3 n4", "n1 n2", "", "", "n1 n2"),
        ("n1 n3 n4", "n1 n2", "", "", "n1 n3"),
        ("n4 n3 n2", "n1 n2", "", "", "n2 n3"),
        ("n1 n2 n3 n4", "n1 n4", "", "", "n1 n4"),  # nodes that had ranks come before an earlier spare one
        ("n1 n2 n3 n4", "n1 n2", "n2 n3", "", "n1 n4"),
        ("n1 n2 n3 n4", "n1 n2", "", "n1", "n2 n3"),
        ("n1 n2", "n1 n2", "", "n1", "n1 n2"),  # better than none
        ("n1", "n1 n2", "", "", None),
        ("n1 n2 n3 n4", "n1 n2", "n1 n2 n3", "", None),
        ("", "n1 n2", "", "", None),
    ],
)
def test_nodes_that_follow(usable: str, used: str, avoid: str, draining: str, chosen: str | None) -> None:
    seen = Allocation(
        hosts=FOUR, used=tuple(used.split()), usable=tuple(usable.split()), draining=tuple(draining.split())
    )
    assert next_nodes(seen, 2, avoid.split()) == (None if chosen is None else tuple(chosen.split()))


@pytest.mark.parametrize(
    ("cause", "usable", "found"),
    [
        (Cause.COMMUNICATION, "n1 n3", Cause.NODE_FAILURE),
        (Cause.HANG, "n1 n3", Cause.NODE_FAILURE),
        (Cause.COMMUNICATION, "n1 n2", Cause.COMMUNICATION),
        (Cause.USER_CODE, "n1 n3", Cause.USER_CODE),
        (Cause.COMMUNICATION, "", Cause.COMMUNICATION),  # nobody answered: that is no node's fault
    ],
)
def test_a_node_without_an_answer_is_the_cause(cause: Cause, usable: str, found: Cause) -> None:
    seen = Allocation(hosts=FOUR, used=("n1", "n2"), usable=tuple(usable.split()))
    diagnosis = with_silent_nodes(Diagnosis(cause=cause, detail="x"), seen)
    assert diagnosis.cause is found
    assert ("n2 gives no answer" in diagnosis.detail) == (found is Cause.NODE_FAILURE)
    assert diagnosis.nodes == ()  # or a requeued job might find too few nodes for ever


def test_bad_nodes_of_this_start_of_the_job() -> None:
    def hang(attempt: str, *hosts: str) -> dict[str, object]:
        places = [{"rank": 0, "host": host} for host in hosts]
        return {"event": "hang_detected", "attempt": attempt, "told_apart": True, "behind": places}

    def decided(attempt: str, cause: str, *hosts: str) -> dict[str, object]:
        return {"event": "restart_decided", "attempt": attempt, "cause": cause, "avoid": list(hosts)}

    events = [decided("7.0", "bad_node", "n9"), decided("8.1", "bad_node", "n8"), decided("7.1", "bad_node", "n3")]
    events += [decided("7.1-1", "node_failure", "n4"), hang("7.1-1", "n1"), hang("7.1-2", "n1", "n2")]
    assert bad_nodes(events, "7.1-3") == {"n3"}  # a lost node may come back, one hang is none's fault
    assert bad_nodes([*events, hang("7.1-3", "n1")], "7.1-3") == {"n1", "n3"}
    assert bad_nodes(events, "local-1") == set()


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    paths = RunPaths(tmp_path / "run")
    paths.logs.mkdir(parents=True)
    spec = RunSpec(
        name="run",
        cluster=ClusterSpec(name="c", scheduler="slurm"),
        resources=ResourcesSpec(nodes=2, spare_nodes=1),
        restart=RestartSpec(how="in_place"),
    )
    paths.config.write_text(sealed(spec))
    return paths


def call(run: RunPaths, capsys: pytest.CaptureFixture[str], command: str, attempt: str, *words: str) -> str:
    process = ("--attempt", attempt, "--job-id", "7", "--pid", str(os.getpid()))
    capsys.readouterr()
    assert main([command, str(run.root), *process, *words]) == 0
    return capsys.readouterr().out.strip()


def end_with(
    run: RunPaths, capsys: pytest.CaptureFixture[str], attempt: str, usable: str, code: int = 137, **fields: object
) -> str:
    """Begin and end an attempt; return what the shell is told."""
    call(run, capsys, "begin", attempt)
    append_event(run, "attempt_started", attempt=attempt, job_id="7", host="n1")
    if fields:
        append_event(run, "stop_requested", attempt=attempt, step=1, deadline=False, **fields)
    nodes = ("--nodes", "n1,n2,n3", "--nodes-used", "n1,n2", "--nodes-usable", usable)
    return call(run, capsys, "end", attempt, "--exit-code", str(code), *nodes)


def test_ranks_before_may_write_no_more(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """From the decision on: what may still live on a node that gives no answer is kept out by the lease."""
    before = Keeper(run, Owner.of_process("7.0"))
    call(run, capsys, "begin", "7.0")
    before.confirm()
    assert end_with(run, capsys, "7.0", "n1,n3") == "in_place 7.0-1 n1,n3"
    assert str(getattr(holder(run), "attempt", "")) == "7.0-1"
    with pytest.raises(RunStateError, match=r"another attempt has taken over run run; 7\.0 writes no more"):
        before.confirm()
    call(run, capsys, "begin", "7.0-1")
    Keeper(run, Owner.of_process("7.0-1")).confirm()
    assert not [event for event in read_events(run) if event["event"].startswith("lease")]
    (decided,) = [event for event in read_events(run) if event["event"] == "restart_decided"]
    assert (decided["cause"], decided["decision"]) == ("node_failure", "in_place")
    assert decided["nodes"] == ["n1", "n3"]
    assert "avoid" not in decided


def test_what_remains_is_requeued(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert end_with(run, capsys, "7.0", "n1") == "requeue"
    assert holder(run) is None
    assert end_with(run, capsys, "7.1", "n1,n2,n3", code=75, signal="SIGUSR2").startswith("requeue")
    assert end_with(run, capsys, "7.2", "n1,n2,n3", code=75, signal="SIGTERM").startswith("requeue")


def test_no_progress_still_ends_the_run(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    """The budgets are those of requeues: here two of `unknown`, which a checkpoint restores."""
    said = [end_with(run, capsys, "7.0", "n1,n2,n3"), end_with(run, capsys, "7.0-1", "n1,n2,n3")]
    assert said == ["in_place 7.0-1 n1,n2", "in_place 7.0-2 n1,n2"]
    run.checkpoint(5).mkdir(parents=True)
    (run.checkpoint(5) / COMPLETE).touch()
    said = [end_with(run, capsys, f"7.0-{number}", "n1,n2,n3").split()[0] for number in (2, 3, 4, 5)]
    assert said == ["in_place", "in_place", "in_place", "stop"]
    assert holder(run) is None


def test_cost_of_a_restart(run: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (8, 9):
        append_line(run.metrics, {"step": step, "loss": 1.0})
    os.utime(run.metrics, (1000.0, 1000.0))
    end_with(run, capsys, "7.0", "n1,n2,n3")
    events = read_events(run)
    cost = {"after": "7.0", "cause": "unknown", "step": 5, "steps_lost": 4, "seconds_lost": 12.5}
    assert restart_cost(events, 5, 1012.5) == cost
    told = {"event": "restarted_in_place", "time": 1.0, "attempt": "7.0-1", **cost}
    assert restart_cost([*events, told], 5, 1012.5) is None
    requeued = {"event": "restart_decided", "time": 1.0, "attempt": "7.0-1", "decision": "requeue"}
    assert restart_cost([*events, requeued], 5, 1012.5) is None
    bare = [{key: value for key, value in event.items() if not key.startswith("reached")} for event in events]
    assert restart_cost(bare, 5, 1012.5) == {"after": "7.0", "cause": "unknown", "step": 5}
