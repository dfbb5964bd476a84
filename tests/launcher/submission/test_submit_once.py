"""One submit makes one job, wherever the launcher is killed and whatever sbatch answers (over a fake Slurm)."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launcher.__main__ import main
from launcher.contract import processes
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths, append_event, read_lines
from launcher.scheduler.slurm.scheduler import Slurm
from launcher.submission.claim import LOCK_FILE, claim
from tests.launcher.conftest import Commands
from tests.slurm.processes import wait_until

RUN = RunPaths(Path("runs/first"))

QUEUE = """\
for word in "$@"; do case "$word" in --comment=*) comment=${word#*=} ;; esac; done
enter() { echo "$(($(wc -l <"$JOBS") + 1))|$comment" >>"$JOBS"; }
"""


@pytest.fixture
def jobs(workdir: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The queue: one line `id|comment` a job."""
    path = workdir / "jobs"
    path.touch()
    monkeypatch.setenv("JOBS", str(path))
    monkeypatch.setattr(Slurm, "settle_seconds", 0.0)
    commands.add("srun", "")
    commands.add("sbatch", f'{QUEUE}enter; tail -n1 "$JOBS" | cut -d"|" -f1')
    commands.add("squeue", 'cat "$JOBS"')
    commands.add("sacct", "exit 1")
    return path


def launch(*words: str) -> int:
    return main(["submit", "cfg.yaml", "--cluster=slurm-dev", *words])


def in_child(action: Callable[[], object]) -> int:
    """Return the wait status of a forked process that does this; an error in it is its exit code 1."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        finally:
            os._exit(code)  # or the child would go on with the tests as well
    return os.waitpid(child, 0)[1]


def killed_at(step: int, folder: Path) -> bool:
    """Submit in a process that is killed just before its `step`-th change below `folder`, or its call of sbatch."""
    changes = {"open", "os.mkdir", "os.rename", "os.remove", "os.chmod", "subprocess.Popen"}
    left = step

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event not in changes or (event == "open" and not (arguments[2] & (os.O_WRONLY | os.O_RDWR))):
            return
        if any(str(folder) in str(argument) for argument in arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def submit() -> None:
        sys.addaudithook(count)
        launch()

    return os.WIFSIGNALED(in_child(submit))


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_any_step_and_called_again_makes_one_job(
    stride: int, workdir: Path, jobs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fourth step up to the job by default, and each step in the slow tier."""
    monkeypatch.setattr("launcher.submission.code_snapshot.checkout_root", lambda: None)  # hundreds of steps all alike
    step, steps = 1, []
    while killed_at(step, Path("runs").absolute()):
        steps.append(len(jobs.read_text().splitlines()))
        assert launch() == 0
        (line,) = jobs.read_text().splitlines()
        (job,) = read_manifest(RUN).jobs
        assert line == f"1|{job.id.token}"
        assert [event["job_id"] for event in read_lines(RUN.events)] == ["1"]
        assert not RUN.submission.exists()
        assert launch() == ExitCode.CONFLICT
        Path("runs").rename(f"runs-{step}")
        jobs.write_text("")
        step += 1 if steps[-1] else stride
    assert steps.count(0) > 10 // stride  # before sbatch
    assert steps.count(1) >= (3 if stride == 1 else 1)  # after it
    assert len(jobs.read_text().splitlines()) == 1


SBATCH_OF_A_KILLED_LAUNCHER = f"""{QUEUE}
kill -9 "$(cut -d' ' -f4 /proc/$PPID/stat)"  # our parent is `timeout`, its parent the launcher
sleep 0.5
enter
"""


def test_sbatch_that_outlives_its_launcher_is_waited_for(workdir: Path, jobs: Path, commands: Commands) -> None:
    sbatch = commands.add("sbatch", SBATCH_OF_A_KILLED_LAUNCHER)
    assert os.WIFSIGNALED(in_child(launch))
    sbatch.unlink()
    assert launch() == 0
    assert jobs.read_text() == f"1|{read_manifest(RUN).jobs[0].id.token}\n"


@pytest.mark.parametrize(
    "end", ["echo what", "kill -9 $$", "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"]
)
def test_lost_answer(
    workdir: Path, jobs: Path, commands: Commands, end: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a job it is adopted; without one nothing is left."""
    commands.add("sbatch", f"{QUEUE}enter; {end}")
    assert launch("--json") == 0
    assert json.loads(capsys.readouterr().out)["job"] == "1"
    commands.add("sbatch", end)
    assert launch("name=second") == ExitCode.SCHEDULER
    assert "Slurm has no such job, so nothing was submitted; try again." in capsys.readouterr().err
    assert not Path("runs/second").exists()


def test_scheduler_that_cannot_be_asked(
    workdir: Path, jobs: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("sbatch", f"{QUEUE}enter; kill -9 $$")
    commands.add("squeue", "echo down >&2; exit 1")
    for _ in range(2):
        assert launch() == ExitCode.SCHEDULER
        assert "squeue failed: down" in capsys.readouterr().err
    assert launch("train.seed=2") == ExitCode.CONFLICT
    assert "was interrupted, and this config is not the one it had" in capsys.readouterr().err
    commands.add("squeue", 'cat "$JOBS"')
    assert main(["resubmit", "first"]) == 0
    assert [job.id.text for job in read_manifest(RUN).jobs] == ["1"]


@pytest.mark.handmade_records
def test_accounts_and_the_jobs_own_word_are_asked(workdir: Path, jobs: Path, commands: Commands) -> None:
    """A job that the queue has forgotten: sacct keeps the command line, or the job has said that it started."""
    commands.add("sbatch", f"{QUEUE}enter; kill -9 $$")
    commands.add("squeue", "")
    commands.add("sacct", 'while IFS="|" read -r id comment; do echo "$id||sbatch --comment=$comment x"; done <"$JOBS"')
    assert launch() == 0
    commands.add("sacct", "exit 1")
    commands.add("sbatch", "kill -9 $PPID; kill -9 $$")
    commands.add("squeue", "exit 1")
    assert launch("name=second") == ExitCode.SCHEDULER
    second = RunPaths(Path("runs/second"))
    append_event(second, "attempt_started", attempt="77.0", job_id="77")
    assert launch("name=second") == 0
    assert read_manifest(second).jobs[0].id.text == "77"


def test_another_machines_submission_is_waited_for(
    workdir: Path, jobs: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands.add("sbatch", "kill -9 $$")
    commands.add("squeue", "exit 1")
    assert launch() == ExitCode.SCHEDULER
    values = json.loads(RUN.submission.read_text())
    RUN.submission.write_text(json.dumps({**values, "host": "elsewhere"}))
    commands.add("squeue", f'cat "$JOBS"; echo "5|{values["token"]}" >>"$JOBS"')
    monkeypatch.setattr(Slurm, "settle_seconds", 0.01)
    assert launch() == 0
    assert read_manifest(RUN).jobs[0].id.text == "5"


def test_user_comment_is_kept(workdir: Path, jobs: Path) -> None:
    assert launch("resources.extra_sbatch=[--comment=my own]") == 0
    assert jobs.read_text().startswith("1|my own sft-")


def test_local_run_of_a_killed_launcher_is_adopted(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TICKS", "200")

    def submit() -> None:
        monkeypatch.setattr(
            "launcher.submission.submit.write_manifest", _killed_when(lambda *given: bool(given[1].jobs))
        )
        main(["submit", "cfg.yaml", fake_python])

    assert os.WIFSIGNALED(in_child(submit))
    assert read_manifest(RUN).jobs == ()
    assert main(["submit", "cfg.yaml", fake_python]) == 0
    (job,) = read_manifest(RUN).jobs
    assert job.process_start is not None
    assert [path.name for path in RUN.logs.iterdir()] in ([], ["local-1"])
    assert main(["cancel", "first"]) == 0
    assert processes.start_ticks(int(job.id.text)) is None


@pytest.mark.handmade_records
def test_local_run_of_a_killed_launcher_is_cancelled(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cancel` was seen to point at another machine, and the run to go on."""
    monkeypatch.setenv("FAKE_TICKS", "200")

    def submit() -> None:
        monkeypatch.setattr(
            "launcher.submission.submit.write_manifest", _killed_when(lambda *given: bool(given[1].jobs))
        )
        main(["submit", "cfg.yaml", fake_python])

    assert os.WIFSIGNALED(in_child(submit))
    RUN.progress.write_text("[")  # which was seen to be unforeseen
    assert main(["cancel", "first"]) == 0
    (job,) = read_manifest(RUN).jobs
    assert job.process_start is not None
    assert processes.start_ticks(int(job.id.text)) is None


def test_local_run_goes_on_without_its_controller(
    workdir: Path, fake_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`status` was seen to say FAILED of a run that trained, `cancel` to refuse it, `resubmit` to start it again."""
    monkeypatch.setenv("FAKE_TICKS", "200")
    assert main(["submit", "cfg.yaml", fake_python]) == 0
    (job,) = read_manifest(RUN).jobs
    wait_until((RUN.logs / "local-1").exists, "the script", timeout=20, interval=0.02)
    os.kill(int(job.id.text), signal.SIGKILL)
    wait_until(lambda: processes.start_ticks(int(job.id.text)) is None, "its end", timeout=20, interval=0.02)
    capsys.readouterr()
    assert main(["status", "first"]) == 0
    assert "RUNNING" in capsys.readouterr().out
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert main(["cancel", "first"]) == 0
    assert [pid for pid in processes.with_text(job.id.token) if processes.session(pid) == int(job.id.text)] == []
    capsys.readouterr()
    assert main(["status", "first"]) == 0
    assert "CANCELLED" in capsys.readouterr().out


def _killed_when(condition: Callable[..., bool]) -> Callable[..., None]:
    from launcher.contract.manifest import write_manifest

    def call(*given: Any) -> None:
        if condition(*given):
            os.kill(os.getpid(), signal.SIGKILL)
        write_manifest(*given)

    return call


def test_claim_survives_the_removal_of_its_directory(tmp_path: Path) -> None:
    """Whoever waited gets a lock in a directory that is there, not on a file that is gone."""
    root = tmp_path / "run"
    held, hold = os.pipe()
    waiting = os.fork()  # before the lock is taken: the child would inherit it, and could wait for itself
    if waiting == 0:
        code = 1
        try:
            os.read(held, 1)
            with claim(root, create=True):
                code = 0 if (root / LOCK_FILE).exists() else 1
        finally:
            os._exit(code)
    with claim(root, create=True):
        os.write(hold, b"x")
        time.sleep(0.2)  # the child waits for the lock
        for path in (root / LOCK_FILE, root):
            path.unlink() if path.is_file() else path.rmdir()
    assert os.waitpid(waiting, 0)[1] == 0
    os.close(held)
    os.close(hold)
