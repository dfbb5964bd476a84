"""How often Slurm is asked, and that a shared answer is never a wrong one."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launcher.contract.job_state import JobState
from launcher.contract.rundir import append_event
from launcher.contract.spec import RunSpec, to_yaml
from launcher.runs.state import collect
from launcher.scheduler.slurm.queries import ask
from launcher.submission.cancel import cancel
from launcher.views.status_table import status_table
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import make_run

ME = [os.getuid()]
LONG_AGO = 1.0


@pytest.fixture
def slurm(commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm whose answers shells share for a minute."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("SFT_SCHEDULER_CACHE_SECONDS", "60")
    return FakeSlurm(commands)


def cache_files(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / f"slurm-sft-launcher-{os.getuid()}").iterdir())


def state(job: str, submitted_at: float = LONG_AGO, *, fresh: bool = False) -> str | None:
    record = ask({job: submitted_at}, ME, fresh=fresh).records.get(job)
    return record.state.value if record else None


def test_a_thousand_runs_are_two_questions(tmp_path: Path, slurm: FakeSlurm) -> None:
    names = [f"run{number}" for number in range(1000)]
    jobs = slurm.submit(*names)
    runs = [make_run(tmp_path, name, job_id=job) for name, job in zip(names, jobs, strict=True)]
    slurm.start(*jobs[:300])
    slurm.end(*jobs[300:600], state="TIMEOUT")
    slurm.forget(*jobs[300:500])
    began = time.process_time()
    rows, problem = collect(runs)
    text = status_table(rows, 100)
    assert time.process_time() - began < 1.0
    assert problem is None
    assert [row.state.value for row in rows] == ["RUNNING"] * 300 + ["TIMEOUT"] * 300 + ["PENDING"] * 400
    assert len(text.splitlines()) == 1001
    assert slurm.questions == 2


def test_load_does_not_grow_with_shells_or_runs(tmp_path: Path, slurm: FakeSlurm) -> None:
    """Each of many shells watches a run of its own, as `wait`, `logs -f` and `status --watch` do."""
    jobs = slurm.submit(*(f"run{number}" for number in range(50)))
    runs = [make_run(tmp_path, f"run{number}", job_id=job) for number, job in enumerate(jobs)]
    for paths in [*runs, *runs]:
        ((row,), _) = collect([paths])
        assert row.state is JobState.PENDING
    assert slurm.questions == 1


def test_shells_that_ask_at_once_share_one_answer(tmp_path: Path, commands: Commands, slurm: FakeSlurm) -> None:
    slow = FakeSlurm(commands, latency=0.5)
    slow.submit("run0")
    make_run(tmp_path / "runs", "run0", job_id="1")
    command = [sys.executable, "-m", "launcher", "status", "--json", "--run-root", str(tmp_path / "runs")]
    shells = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    answers = [json.loads(shell.communicate()[0]) for shell in shells]
    assert [answer[0]["state"] for answer in answers] == ["PENDING"] * 4
    assert slow.questions == 1


def test_an_answer_says_nothing_of_jobs_submitted_after_it(slurm: FakeSlurm) -> None:
    slurm.submit("a")
    assert state("1") == "PENDING"
    slurm.submit("b", first=2)
    assert state("2", submitted_at=time.time()) == "PENDING"
    assert slurm.questions == 2


def test_who_acts_asks_again(slurm: FakeSlurm) -> None:
    slurm.submit("a")
    assert state("1") == "PENDING"
    slurm.start("1")
    assert state("1") == "PENDING"
    assert state("1", fresh=True) == "RUNNING"
    assert state("1") == "RUNNING"


def test_a_cancelled_run_is_asked_about_again(tmp_path: Path, commands: Commands, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    commands.add("scancel", f"sed -i 's/PENDING/CANCELLED/' {commands.folder}/queue")
    paths = make_run(tmp_path, "a", job_id="1")
    paths.config.write_text(to_yaml(RunSpec()))
    cancel([paths])
    assert state("1") == "CANCELLED"


def test_a_config_that_cannot_be_read_keeps_no_run_alive(tmp_path: Path, commands: Commands, slurm: FakeSlurm) -> None:
    slurm.submit("a", "b")
    commands.add("scancel", f'echo "$*" >>{tmp_path}/ended')
    runs = [make_run(tmp_path, name, job_id=job) for name, job in (("a", "1"), ("b", "2"))]
    runs[0].config.write_text("{{{")
    runs[1].config.write_text(to_yaml(RunSpec()))
    done = cancel(runs)
    assert len((tmp_path / "ended").read_text().splitlines()) == 2
    assert [line.partition(" ")[0] for line in done] == ["cancelled", "left", "cancelled"]


def test_an_old_answer_is_asked_again(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.submit("a")
    assert state("1") == "PENDING"
    slurm.start("1")
    later = time.time() + 61
    monkeypatch.setattr(time, "time", lambda: later)
    assert state("1") == "RUNNING"


def test_sacct_is_not_asked_again_for_what_it_has_told(slurm: FakeSlurm, commands: Commands) -> None:
    slurm.submit("a", "b")
    slurm.end("1", state="FAILED", exit_code="2:0")
    slurm.forget("1")
    assert [state("1"), state("1")] == ["FAILED", "FAILED"]
    assert len(commands.calls("sacct")) == 1
    slurm.requeue("1")
    assert state("1", fresh=True) == "PENDING"  # squeue's word is the newer one


def test_complaints_are_shared_too_and_end(slurm: FakeSlurm, commands: Commands) -> None:
    slurm.submit("a")
    commands.add("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert ask({"1": LONG_AGO}, ME).problem == "squeue failed: Unable to contact slurm controller"
    assert ask({"1": LONG_AGO}, ME).problem == "squeue failed: Unable to contact slurm controller"
    assert len(commands.calls("squeue")) == 1
    FakeSlurm(commands).submit("a")
    assert state("1", fresh=True) == "PENDING"


def test_sacct_that_fails_is_a_doubt_and_no_verdict(tmp_path: Path, slurm: FakeSlurm, commands: Commands) -> None:
    commands.add("sacct", "echo 'Connection refused' >&2; exit 1")
    paths = make_run(tmp_path, "a", job_id="1")
    ((row,), problem) = collect([paths])
    assert (row.state, row.reason, problem) == (JobState.UNKNOWN, "sacct failed: Connection refused", None)
    append_event(paths, "attempt_started", attempt="1.0", job_id="1")
    append_event(paths, "attempt_ended", attempt="1.0", exit_code=2)
    ((row,), _) = collect([paths])
    assert row.state is JobState.FAILED


def test_the_shared_answer_is_private(tmp_path: Path, slurm: FakeSlurm) -> None:
    slurm.submit("a")
    state("1")
    for path in cache_files(tmp_path):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_folder_that_others_can_write_to_is_not_trusted(tmp_path: Path, slurm: FakeSlurm) -> None:
    (tmp_path / f"slurm-sft-launcher-{os.getuid()}").mkdir()
    (tmp_path / f"slurm-sft-launcher-{os.getuid()}").chmod(0o777)
    slurm.submit("a")
    assert [state("1"), state("1")] == ["PENDING", "PENDING"]
    assert slurm.questions == 2
    assert cache_files(tmp_path) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"asked": "x"}', '{"asked": 1e99, "queue": [{"state": "NEW"}]}'])
def test_an_unreadable_answer_is_asked_again(tmp_path: Path, slurm: FakeSlurm, text: str) -> None:
    slurm.submit("a")
    state("1")
    for path in cache_files(tmp_path):
        path.write_text(text)
    assert state("1") == "PENDING"
    assert slurm.questions == 2


def test_clusters_do_not_share_answers(slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm.submit("a")
    state("1")
    monkeypatch.setenv("SLURM_CONF", "/another/slurm.conf")
    state("1")
    assert slurm.questions == 2
