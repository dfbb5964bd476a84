"""Causes of an attempt's end and the restart decisions that follow, from made-up evidence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.attempts.cause import Cause, Diagnosis, Evidence, classify
from launcher.attempts.evidence import gather
from launcher.attempts.restart import Action, Past, decide, spent
from launcher.contract.job_state import JobState
from launcher.contract.rank_error import RankError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import RestartSpec
from launcher.scheduler.base import JobView
from launcher.scheduler.slurm.parsers import parse_job_view, parse_log
from launcher.scheduler.slurm.scheduler import Slurm

RUNNING = JobView(state=JobState.RUNNING)
ENDING = JobView(state=JobState.COMPLETING)
REQUEUED = JobView(state=JobState.COMPLETING, restarts=1)


def ended(log: str, exit_code: int) -> Evidence:
    """An attempt of a job that Slurm ended with these words."""
    return Evidence(exit_code=exit_code, ended_as=parse_log(log), log=log)


def error(*kinds: str, message: str = "x") -> RankError:
    return RankError(kinds=kinds, message=message)


@pytest.mark.parametrize(
    ("seen", "cause"),
    [
        (Evidence(exit_code=0, job=REQUEUED), Cause.DONE),
        (Evidence(exit_code=75, cancelled=True, job=ENDING), Cause.CANCELLED),
        (Evidence(exit_code=75, stop_signal="SIGTERM", job=ENDING), Cause.CANCELLED),
        (Evidence(exit_code=75, stop_signal="SIGTERM", job=REQUEUED), Cause.PREEMPTED),
        (Evidence(exit_code=75, stop_signal="SIGTERM", restart=1, job=REQUEUED), Cause.CANCELLED),
        (Evidence(exit_code=75, job=JobView(state=JobState.RUNNING, preempted=True)), Cause.PREEMPTED),
        (Evidence(exit_code=75, stop_signal="SIGUSR2", job=RUNNING), Cause.TIMEOUT),
        (Evidence(exit_code=75, stop_deadline=True), Cause.TIMEOUT),
        (Evidence(exit_code=75, stop_signal="SIGTERM", requeues=False), Cause.CANCELLED),
        (Evidence(exit_code=140), Cause.TIMEOUT),
        (ended("*** STEP 7.0 ON n CANCELLED AT x DUE TO TIME LIMIT ***", 143), Cause.TIMEOUT),
        (ended("*** JOB 7 ON n CANCELLED AT x DUE TO NODE FAILURE ***", 1), Cause.NODE_FAILURE),
        (Evidence(exit_code=76, job=RUNNING), Cause.HANG),
        (Evidence(exit_code=77, bad_nodes=("n3",)), Cause.BAD_NODE),
        (Evidence(exit_code=1, error=error("OutOfMemoryError", "RuntimeError")), Cause.OUT_OF_MEMORY),
        (Evidence(exit_code=137, log="Detected 1 oom_kill event in StepId=7.0"), Cause.OUT_OF_MEMORY),
        (Evidence(exit_code=1, error=error("DistBackendError", "DistError", "RuntimeError")), Cause.COMMUNICATION),
        (
            Evidence(exit_code=1, error=error("RuntimeError", message="gloo/transport/tcp/pair.cc: closed")),
            Cause.COMMUNICATION,
        ),
        (Evidence(exit_code=1, error=error("ZeroDivisionError", "ArithmeticError", "Exception")), Cause.USER_CODE),
        (Evidence(exit_code=1, error=error("TrainingError", "LauncherError", "Exception")), Cause.USER_CODE),
        (Evidence(exit_code=1, error=error("FileNotFoundError", "OSError", "Exception")), Cause.UNKNOWN),
        (Evidence(exit_code=2, error=error("DataError", "ConfigError", "LauncherError")), Cause.DATA),
        (Evidence(exit_code=2, error=error("UserCodeError", "ConfigError", "LauncherError")), Cause.USER_CODE),
        (Evidence(exit_code=2, error=error("ModelError", "ConfigError", "LauncherError")), Cause.CONFIG),
        (
            Evidence(exit_code=74, error=error("CheckpointError", message="[Errno 28] No space left on device")),
            Cause.DISK_FULL,
        ),
        (Evidence(exit_code=137, job=RUNNING), Cause.UNKNOWN),
        (Evidence(exit_code=3), Cause.COMMUNICATION),  # no controller told the address of the first node
        (Evidence(exit_code=17), Cause.UNKNOWN),
    ],
)
def test_cause(seen: Evidence, cause: Cause) -> None:
    assert classify(seen).cause is cause


def test_bad_hardware_names_its_host() -> None:
    broken = RankError(kinds=("AcceleratorError",), message="CUDA error: uncorrectable ECC error", host="n7")
    assert classify(Evidence(exit_code=1, error=broken)).nodes == ("n7",)
    assert classify(Evidence(exit_code=77, bad_nodes=("n3", "n4"))).nodes == ("n3", "n4")


def diagnosis(cause: Cause) -> Diagnosis:
    return Diagnosis(cause=cause, detail="")


def past(cause: Cause, *, progressed: bool = False) -> Past:
    return Past(cause=cause, goes_on=True, progressed=progressed)


def test_budget_counts_restarts_without_progress_of_one_cause() -> None:
    before = [past(Cause.UNKNOWN)] * 5 + [past(Cause.HANG, progressed=True), past(Cause.HANG), past(Cause.UNKNOWN)]
    assert spent(Cause.UNKNOWN, before) == 1
    assert spent(Cause.HANG, before) == 1
    assert spent(Cause.TIMEOUT, before) == 0


def test_budget_runs_out_and_progress_is_free() -> None:
    policy = RestartSpec(unknown=2)
    before: list[Past] = []
    left = []
    for _ in range(2):
        decision = decide(diagnosis(Cause.UNKNOWN), 137, before, policy, progressed=False)
        assert decision.action is Action.REQUEUE
        left.append(decision.left)
        before.append(past(Cause.UNKNOWN))
    assert left == [1, 0]
    over = decide(diagnosis(Cause.UNKNOWN), 137, before, policy, progressed=False)
    assert (over.action, over.left) == (Action.STOP, 0)
    assert "all 2 restarts without progress are used up (restart.unknown: 2)" in over.reason
    free = decide(diagnosis(Cause.UNKNOWN), 137, before, policy, progressed=True)
    assert (free.action, free.left) == (Action.REQUEUE, 2)


@pytest.mark.parametrize("cause", [Cause.CANCELLED, Cause.USER_CODE, Cause.DATA, Cause.CONFIG, Cause.DONE])
def test_final_causes_never_start_again(cause: Cause) -> None:
    assert decide(diagnosis(cause), 1, [], RestartSpec(), progressed=True).action is Action.STOP
    assert decide(diagnosis(cause), 1, [], RestartSpec(), progressed=True, requeued=True).action is Action.WITHDRAW


def test_exit_codes_that_forbid_it() -> None:
    for code in (93, 4):
        assert decide(diagnosis(Cause.UNKNOWN), code, [], RestartSpec(), progressed=True).action is Action.STOP


def test_ways_to_go_on() -> None:
    timeout = diagnosis(Cause.TIMEOUT)
    for how, action in (("requeue", Action.REQUEUE), ("resubmit", Action.RESUBMIT), ("none", Action.STOP)):
        assert decide(timeout, 75, [], RestartSpec(how=how), progressed=True).action is action  # type: ignore[arg-type]
    assert decide(timeout, 75, [], RestartSpec(), progressed=True, requeued=True).action is Action.LEAVE
    assert decide(timeout, 75, [], RestartSpec(), progressed=True, requeues=False).action is Action.STOP
    assert decide(timeout, 75, [], RestartSpec(timeout=0), progressed=True).action is Action.STOP


@pytest.mark.parametrize("cause", [cause for cause in Cause if hasattr(RestartSpec, cause.value)])
def test_in_place_where_the_job_keeps_its_nodes(cause: Cause) -> None:
    policy = RestartSpec(how="in_place", disk_full=1)
    way = decide(diagnosis(cause), 1, [], policy, progressed=True, in_place=True).action
    assert way is (Action.REQUEUE if cause in (Cause.TIMEOUT, Cause.PREEMPTED) else Action.IN_PLACE)
    assert decide(diagnosis(cause), 1, [], policy, progressed=True).action is Action.REQUEUE
    assert (
        decide(diagnosis(cause), 1, [], RestartSpec(disk_full=1), progressed=True, in_place=True).action
        is Action.REQUEUE
    )
    left = decide(diagnosis(cause), 1, [], policy, progressed=True, in_place=True, requeued=True)
    assert left.action is Action.LEAVE


def test_job_as_scontrol_shows_it() -> None:
    text = (
        "JobId=7 JobName=a JobState=COMPLETING Reason=None Dependency=(null) Requeue=1 Restarts=2 BatchFlag=1 "
        "PreemptEligibleTime=2026-01-01T00:00:00 PreemptTime=None ExcNodeList=n[1-2] Command=/x JobState=RUNNING"
    )
    assert parse_job_view(text) == JobView(state=JobState.COMPLETING, restarts=2, preempted=False, excluded="n[1-2]")
    assert parse_job_view("JobState=RUNNING PreemptTime=2026-01-01T00:00:00 ExcNodeList=(null)") == JobView(
        state=JobState.RUNNING, preempted=True
    )
    assert parse_job_view("slurm_load_jobs error: Invalid job id specified") is None


@pytest.mark.parametrize(("code", "cause"), [(2, Cause.USER_CODE), (137, Cause.UNKNOWN)])
def test_error_of_another_rank_than_the_first_to_exit(tmp_path: Path, code: int, cause: Cause) -> None:
    """Ranks that agreed to raise end in any order; a killed one records nothing, and its victims' errors mislead."""
    run = RunPaths(tmp_path)
    run.error("7.0").parent.mkdir(parents=True)
    error = {"kinds": ["UserCodeError", "ConfigError"], "message": "the metric failed", "rank": 1, "host": "n2"}
    run.error("7.0").write_text(json.dumps(error))
    run.failure("7.0").write_text(f"{code} 0 n1\n")
    assert classify(gather(run, Slurm(), "7.0", code, None, "7", [])).cause is cause
