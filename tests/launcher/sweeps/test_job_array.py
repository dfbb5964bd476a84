"""Sweeps as job arrays: one sbatch, one run for each element, the same guarantees as for single jobs."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest, write_manifest
from launcher.contract.rundir import RunPaths
from launcher.submission.unchanged import digests
from tests.launcher.conftest import Commands
from tests.launcher.submission.test_submit_once import in_child

WORDS = ["submit", "cfg.yaml", "--cluster=slurm-dev"]
RUNS = [RunPaths(Path(f"runs/first-{number}")) for number in range(4)]


@pytest.fixture
def jobs(workdir: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config whose sweep is an array of four, and a Slurm that remembers jobs as `id|comment`."""
    monkeypatch.setattr("launcher.scheduler.slurm.scheduler.Slurm.settle_seconds", 0.0)
    with Path("cfg.yaml").open("a") as file:
        file.write("sweep: {product: {train.seed: [1, 2, 3, 4]}, max_at_once: 2, as: array}\n")
    path = workdir / "jobs"
    path.touch()
    monkeypatch.setenv("JOBS", str(path))
    commands.add("srun", "")
    commands.add(
        "sbatch",
        'cp "${@: -1}" "$JOBS.script"; echo "$(($(wc -l <"$JOBS") + 7))|$*" >>"$JOBS"; tail -1 "$JOBS"|cut -d"|" -f1',
    )
    commands.add("squeue", 'cat "$JOBS"')
    commands.add("scontrol", 'printf "MaxJobCount = 10000\\nMaxArraySize            = 1001\\n"')
    commands.add("sacctmgr", "exit 1")
    commands.add("sacct", "exit 1")
    return path


def jobs_of_runs() -> list[list[str]]:
    return [[job.id.text for job in read_manifest(run).jobs] for run in RUNS]


def test_one_job_for_all_runs(jobs: Path, workdir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WORDS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == {f"first-{number}": f"7_{number}" for number in range(4)}
    (line,) = jobs.read_text().splitlines()
    assert "--array=0-3%2" in line
    assert jobs_of_runs() == [["7_0"], ["7_1"], ["7_2"], ["7_3"]]
    script = Path(f"{jobs}.script").read_text()
    assert "#SBATCH --job-name=first\n" in script
    assert "#SBATCH --time=1:30:00\n" in script
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", f"{jobs}.script"], check=True)
    RUNS[2].script.write_text("#!/bin/bash\necho this is 2\n")
    element = {**os.environ, "SLURM_ARRAY_TASK_ID": "2"}
    done = subprocess.run(["bash", f"{jobs}.script"], env=element, capture_output=True, text=True)
    assert (done.returncode, f"{RUNS[2].script.absolute()} is not what was submitted" in done.stdout) == (2, True)
    write_manifest(RUNS[2], dataclasses.replace(read_manifest(RUNS[2]), digests=digests(RUNS[2])))
    done = subprocess.run(["bash", f"{jobs}.script"], env=element, capture_output=True, text=True)
    assert done.stdout == "this is 2\n"
    assert main(WORDS) == ExitCode.CONFLICT


@pytest.mark.parametrize("when", ["before", "after", "recording"])
def test_killed_and_called_again(jobs: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def submit() -> None:
        names = {
            "before": "submission.intent.begin",
            "after": "sweeps.job_array.record",
            "recording": "submission.intent.end",
        }
        monkeypatch.setattr(f"launcher.{names[when]}", die)
        main(WORDS)

    assert os.WIFSIGNALED(in_child(submit))
    marker = RUNS[1].root / "a-job-writes-here"
    marker.touch()
    assert main(WORDS) == (ExitCode.CONFLICT if when == "recording" else 0)  # all of it was submitted
    assert len(jobs.read_text().splitlines()) == 1
    assert jobs_of_runs() == [["7_0"], ["7_1"], ["7_2"], ["7_3"]]
    assert marker.exists() == (when != "before")


def test_arrays_are_no_larger_than_the_cluster_allows(jobs: Path, commands: Commands) -> None:
    commands.add("scontrol", 'printf "MaxArraySize = 3\\n"')
    assert main(WORDS) == 0
    first, second = jobs.read_text().splitlines()
    assert "--array=0-2%2" in first
    assert "--dependency=afterany:7 --array=0-0%2" in second
    assert jobs_of_runs() == [["7_0"], ["7_1"], ["7_2"], ["8_0"]]


def test_runs_that_ask_for_different_things_are_no_array(jobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("cfg.yaml")
    config.write_text(config.read_text().replace("train.seed: [1, 2, 3, 4]", "resources.time: [10, 20]"))
    assert main(WORDS) == ExitCode.BAD_INPUT
    assert "(#SBATCH --time=10, #SBATCH --time=20); use `as: runs`" in capsys.readouterr().err
    assert not Path("runs").exists()
    assert main(["submit", "cfg.yaml"]) == ExitCode.BAD_INPUT


def test_refused_array_can_be_tried_again(
    jobs: Path, commands: Commands, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then no file of secrets waits for jobs that do not exist."""
    monkeypatch.setenv("A_TOKEN", "x")
    Path("cfg.yaml").write_text(Path("cfg.yaml").read_text() + "env_from: [A_TOKEN]\n")
    monkeypatch.setattr("launcher.submission.secret_files.DEFAULT_FOLDER", workdir / "secrets")
    sbatch = (commands.folder / "sbatch").read_text()
    commands.add("sbatch", "exit 1")
    assert main(WORDS) == ExitCode.SCHEDULER
    assert list((workdir / "secrets").iterdir()) == []
    (commands.folder / "sbatch").write_text(sbatch)
    assert main(WORDS) == 0
    assert len(list((workdir / "secrets").iterdir())) == 4
    assert jobs_of_runs() == [["7_0"], ["7_1"], ["7_2"], ["7_3"]]
