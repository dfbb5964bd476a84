"""The scheduler's answers: what our parsers and the stand-in for Slurm take for granted, on a real one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.contract.job_state import JobState
from launcher.scheduler.slurm import commands as queries
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until

pytestmark = pytest.mark.slurm

_QUEUE_LINE = re.compile(r"\d+(_\d+|_\[[\d,:%-]+\])?\|[A-Z_]+\|[\w ]+ \[.+\]\|(N/A|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\|.*")
_ACCOUNT_LINE = re.compile(
    r"\d+(_\d+|_\[[\d,:%-]+\])?\|[A-Z_]+( by \d+)?\|\d+:\d+\|(Unknown|None|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)\|.*"
)
ME = [os.getuid()]
SLEEP = ["sbatch", "--parsable", "--output=/dev/null"]


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return Commands(folder)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Everything Slurm's commands print from here on."""
    printed: list[str] = []
    run = queries._run

    def listening(command: list[str], patience: float | None = None) -> str:
        text = run(command, patience)
        printed.extend(text.splitlines())
        return text

    monkeypatch.setattr(queries, "_run", listening)
    yield printed


def use(cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PATH", "SLURM_CONF"):
        monkeypatch.setenv(name, cluster.env[name])


def test_stand_in_answers_in_the_same_form(commands: Commands, answers: list[str]) -> None:
    fake = FakeSlurm(commands)
    waiting, running = fake.submit("waiting", "a name | with bars")
    fake.start(running)
    queue = queries.queue(ME)
    assert [queue[job].state for job in (waiting, running)] == [JobState.PENDING, JobState.RUNNING]
    assert queue[running].name == "a name | with bars"
    assert all(_QUEUE_LINE.fullmatch(line) for line in answers), answers
    answers.clear()
    fake.end(waiting, state="CANCELLED")
    fake.forget(waiting)
    assert queries.accounting([waiting], since=0.0)[waiting].state is JobState.CANCELLED
    assert all(_ACCOUNT_LINE.fullmatch(line) for line in answers[1:]), answers


def test_queue(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    """Running, waiting with and without a planned start, held, an array's tasks: one question for all of them."""
    running = slurm.run([*SLEEP, "-N4", "--exclusive", "--time=5", "--wrap", "sleep 300"]).stdout.strip()
    slurm.wait_for_job(running, {"RUNNING"})
    name = "a name | with bars"
    waiting = slurm.run(
        [*SLEEP, f"--job-name={name}", "-N4", "--time=5", "--exclusive", "--wrap", "true"]
    ).stdout.strip()
    held = slurm.run([*SLEEP, "--hold", "--wrap", "true"]).stdout.strip()
    odd_tasks = ",".join(str(task) for task in range(1, 120, 2))  # longer than squeue shows by itself
    array = slurm.run([*SLEEP, f"--array={odd_tasks}%5", "--hold", "--wrap", "true"]).stdout.strip()
    use(slurm, monkeypatch)
    monkeypatch.setenv("SQUEUE_STATES", "COMPLETED")
    monkeypatch.setenv("SLURM_TIME_FORMAT", "relative")
    queue = queries.queue(ME)
    assert queue[running].state is JobState.RUNNING
    assert (queue[waiting].state, queue[waiting].name) == (JobState.PENDING, name)
    assert queue[held].state is JobState.HELD
    assert [queue[f"{array}_{task}"].state for task in range(1, 120, 2)] == [JobState.HELD] * 60
    assert all(_QUEUE_LINE.fullmatch(line) for line in answers), answers
    wait_until(
        lambda: queries.queue(ME)[waiting].expected_start is not None, "Slurm to plan the job", timeout=90, interval=1
    )


def test_accounts(slurm_with_accounting: SlurmCluster, monkeypatch: pytest.MonkeyPatch, answers: list[str]) -> None:
    cluster = slurm_with_accounting
    failed = cluster.run([*SLEEP, "--wrap", "exit 7"]).stdout.strip()
    held = cluster.run([*SLEEP, "--hold", "--array=1-3%2", "--wrap", "true"]).stdout.strip()
    cluster.wait_for_job(failed, {"FAILED"})
    use(cluster, monkeypatch)

    def known() -> bool:
        records = queries.accounting([failed, held], since=0.0)
        return failed in records and f"{held}_1" in records and records[failed].state is JobState.FAILED

    wait_until(known, "sacct to know the jobs", timeout=60, interval=1)
    records = queries.accounting([failed, held], since=0.0)
    assert (records[failed].exit_code, records[failed].signal) == (7, 0)
    assert [records[f"{held}_{task}"].state for task in (1, 2, 3)] == [JobState.PENDING] * 3
    assert all(_ACCOUNT_LINE.fullmatch(line) or line.startswith("JobID") for line in answers), answers
