"""Slurm's commands: what they are asked, and what it means when one fails."""

from __future__ import annotations

import time

import pytest

from launcher.contract.errors import SchedulerError
from launcher.scheduler.slurm import commands as slurm
from launcher.scheduler.slurm import queries
from tests.launcher.conftest import Commands
from tests.launcher.scheduler.slurm.test_parsers import fixture


def test_squeue_that_calls_a_job_invalid_has_not_answered(commands: Commands) -> None:
    words = fixture("squeue-unknown-job").split("stderr: ")[1].strip()
    commands.add("squeue", f"echo '{words}' >&2; exit 1")
    with pytest.raises(SchedulerError, match="Invalid job id specified"):
        slurm.queue([0])


def test_queue_asks_for_all_jobs_of_the_users(commands: Commands) -> None:
    commands.add("squeue", "echo '7|RUNNING|None|2026-01-01T00:00:00|a'")
    assert list(slurm.queue([0, 1000])) == ["7"]
    assert commands.calls("squeue") == ["--noheader --states=all --user=0,1000 --format=%i|%T|%r [%E]|%S|%j|%k"]


def test_a_users_own_filters_hide_no_job(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SQUEUE_PARTITION", "SQUEUE_STATES", "SACCT_FEDERATION"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    commands.add("squeue", 'echo "7|RUNNING|None|${SLURM_TIME_FORMAT-unset}|${SQUEUE_PARTITION-}${SQUEUE_STATES-}"')
    assert (slurm.queue([0])["7"].start, slurm.queue([0])["7"].name) == ("unset", "")


def test_queue_that_fails_is_no_answer(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"^squeue failed: slurm_load_jobs error: Unable to contact"):
        slurm.queue([0])
    commands.add("squeue", "exec sleep 10")
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SchedulerError, match=r"^squeue gave no answer within 0\.2 s"):
        slurm.queue([0])
    monkeypatch.setenv("PATH", str(commands.folder / "nothing"))
    with pytest.raises(SchedulerError, match=r"^squeue is not on PATH"):
        slurm.queue([0])


def test_site_without_accounting(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("sacct", f"echo '{fixture('sacct-no-accounting').split('stderr: ')[1].strip()}' >&2; exit 1")
    assert slurm.accounting(["7"], since=0.0) == {}
    monkeypatch.setenv("PATH", str(commands.folder / "nothing"))
    assert slurm.accounting(["7"], since=0.0) == {}


def test_sacct_that_fails_is_no_answer(commands: Commands) -> None:
    commands.add("sacct", "echo 'slurm_persist_conn_open: Connection refused' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"^sacct failed: slurm_persist_conn_open"):
        slurm.accounting(["7"], since=0.0)


def test_sacct_is_not_asked_for_what_had_the_same_id_before(commands: Commands) -> None:
    commands.add("sacct", "")
    slurm.accounting(["7", "8_3"], since=1_700_000_000.0)
    (call,) = commands.calls("sacct")
    began = time.mktime(time.strptime(call.split("--starttime=")[1].split()[0], "%Y-%m-%dT%H:%M:%S"))
    assert began == 1_700_000_000 - 3600
    assert "--jobs=7,8_3 " in call


def test_the_cluster_is_in_every_question(commands: Commands) -> None:
    for name in ("squeue", "sacct", "scancel", "sinfo", "sbatch"):
        commands.add(name, "")
    slurm.queue([0], "far")
    slurm.accounting(["7"], 0.0, "far")
    slurm.find_job("sft-1", 0.0, "far")
    slurm.cancel("7", "far")
    slurm.node_names("far")
    slurm.expected_start("", "far")
    for name in ("squeue", "sacct", "scancel", "sinfo", "sbatch"):
        assert all("--clusters=far" in call for call in commands.calls(name)), name
        assert commands.calls(name)


def test_of_several_clusters_the_one_that_has_the_job_is_told(commands: Commands) -> None:
    """As Slurm 22.05 answers: with a header, which --noheader would take away as well."""
    head = "ARRAY_JOB_ID|COMMENT"
    commands.add("squeue", f"printf 'CLUSTER: near\\n{head}\\n\\nCLUSTER: far\\n{head}\\n128400|sft-x\\n'")
    commands.add("sacct", "")
    assert slurm.find_job("sft-x", 0.0, "near,far") == ("128400", "far")
    assert slurm.find_job("sft-x", 0.0, "all") == ("128400", "far")
    commands.add("squeue", "")
    assert slurm.find_job("sft-x", 0.0, "all") is None
    commands.add("sacct", "echo '128400|far||sbatch --comment=sft-x --clusters=near,far job.sh'")
    assert slurm.find_job("sft-x", 0.0, "near,far") == ("128400", "far")
    assert slurm.find_job("sft-x", 0.0) == ("128400", "")


def test_sacct_before_slurm_21_08_knows_no_submit_line(commands: Commands) -> None:
    old = (
        'case "$*" in *SubmitLine*) echo "sacct: fatal: Invalid field requested: \\"SubmitLine\\"" >&2; exit 1 ;; esac'
    )
    commands.add("sacct", f"{old}; printf 'JobID|State|ExitCode|Start|JobName\\n7|FAILED|2:0|N/A|a\\n'")
    assert slurm.accounting(["7"], 0.0)["7"].exit_code == 2


def test_a_job_that_scancel_does_not_know_is_not_cancelled(commands: Commands) -> None:
    commands.add("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2")
    with pytest.raises(SchedulerError, match="Invalid job id specified"):
        slurm.cancel("7")


def test_jobs_that_wait_are_pointed_at_the_new_job(commands: Commands) -> None:
    lines = ("8|afterok:7(failed)", "9|afterany:70(unfulfilled)", "10|after:3+5,afterany:7(unfulfilled)", "11|(null)")
    commands.add("squeue", "printf '%s\\n' " + " ".join(f"'{line}'" for line in lines))
    commands.add("scontrol", "")
    waiting = slurm.dependents("7")
    assert waiting == {"8": "afterok:7", "10": "after:3+5,afterany:7"}
    for job, clauses in waiting.items():
        slurm.wait_for(job, clauses, "7", "20")
    assert commands.calls("scontrol") == [
        "update JobId=8 Dependency=afterok:20",
        "update JobId=10 Dependency=after:3+5,afterany:20",
    ]


def test_a_look_waits_less_than_a_decision(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("squeue", "exec sleep 10")
    monkeypatch.setattr(slurm, "GLANCE_SECONDS", 0.2)
    assert queries.ask({"7": 0.0}, [0]).problem == "squeue gave no answer within 0.2 s; Slurm may be overloaded"
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.4)
    assert (
        queries.ask({"7": 0.0}, [0], fresh=True).problem
        == "squeue gave no answer within 0.4 s; Slurm may be overloaded"
    )
