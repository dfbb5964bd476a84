"""Slurm's commands: what they are asked, and what it means when one fails."""

from __future__ import annotations

import time

import pytest

from launcher.contract.errors import SchedulerError
from launcher.scheduler.slurm import commands as slurm
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
    assert commands.calls("squeue") == ["--noheader --states=all --user=0,1000 --format=%i|%T|%r|%S|%j"]


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
