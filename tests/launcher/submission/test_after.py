"""Runs that wait for others: the dependency, what is refused, and which files may still be missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, append_event
from tests.launcher.conftest import Commands

SLURM = "--cluster=slurm-dev"


@pytest.fixture
def parent(workdir: Path, commands: Commands) -> RunPaths:
    """A run `first` with job 7, which squeue says is in the state that the file `state` holds."""
    commands.add("srun", "")
    commands.add("sbatch", "echo 7")
    commands.add("squeue", f'[ ! -s {workdir}/state ] || echo "7|$(cat {workdir}/state)|None|N/A|first"')
    commands.add("sacct", "exit 1")
    assert main(["submit", "cfg.yaml", SLURM]) == 0
    return RunPaths(workdir / "runs" / "first")


def submit(workdir: Path, state: str, *words: str) -> int:
    (workdir / "state").write_text(state)
    return main(["submit", "cfg.yaml", SLURM, "name=second", "after=first", *words])


def test_job_of_a_waiting_run_is_named(workdir: Path, parent: RunPaths, commands: Commands) -> None:
    own = "resources.extra_sbatch=[--dependency=singleton]"
    assert (
        submit(workdir, "RUNNING", own, f"model.path={parent.export}", "checkpoint.resume_from=runs/first/checkpoints")
        == 0
    )
    assert "--dependency=singleton,afterok:7 " in commands.calls("sbatch")[-1]
    assert submit(workdir, "PENDING", "name=third", f"after={parent.root}") == 0
    assert "--dependency=afterok:7 " in commands.calls("sbatch")[-1]


@pytest.mark.handmade_records
def test_finished_run_is_not_waited_for(workdir: Path, parent: RunPaths, commands: Commands) -> None:
    append_event(parent, "attempt_started", attempt="7.0", job_id="7")
    append_event(parent, "attempt_ended", attempt="7.0", exit_code=0)
    assert submit(workdir, "COMPLETED") == 0
    assert "--dependency" not in commands.calls("sbatch")[-1]


@pytest.mark.parametrize("state", ["FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"])
def test_run_that_failed_is_refused(
    workdir: Path, parent: RunPaths, state: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(workdir, state) == ExitCode.CONFLICT
    assert f"after: run first is {state}, so this one would wait for ever" in capsys.readouterr().err
    assert not (workdir / "runs" / "second").exists()


def test_unknown_state_and_unknown_run(workdir: Path, parent: RunPaths, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit(workdir, "") == ExitCode.SCHEDULER
    assert "after: cannot tell whether run first will succeed" in capsys.readouterr().err
    assert submit(workdir, "RUNNING", "after=nobody") == ExitCode.BAD_INPUT
    assert f"after: nobody is not a run in {workdir}/runs" in capsys.readouterr().err
    assert main(["submit", "cfg.yaml", "name=local", "after=first"]) == ExitCode.BAD_INPUT
    assert "jobs of scheduler local cannot wait for jobs of scheduler slurm" in capsys.readouterr().err


def test_only_what_the_run_before_will_write_may_be_missing(
    workdir: Path, parent: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = f"model.path={workdir}/runs/other/export"
    assert submit(workdir, "RUNNING", missing) == ExitCode.BAD_INPUT
    assert "model.path: " in capsys.readouterr().err
    # the layout is checked against the model that the run before trains: 4 layers do not make 5 stages
    stages = ["topology.pipeline_parallel=5", "resources.tasks_per_node=5"]
    assert submit(workdir, "RUNNING", f"model.path={parent.export}", *stages) == ExitCode.BAD_INPUT
    assert "4 layers are fewer than the model chunks of pipeline_parallel 5" in capsys.readouterr().err


def test_what_the_run_before_does_not_write_is_refused_at_once(
    workdir: Path, parent: RunPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(workdir, "RUNNING", f"model.path={parent.root}/exprot") == ExitCode.BAD_INPUT
    assert "run first will not write it: it writes export and checkpoints" in capsys.readouterr().err
    config = parent.config.read_text()
    assert "  export: true\n" in config
    (workdir / "state").write_text("RUNNING")
    assert main(["submit", "cfg.yaml", SLURM, "name=bare", "checkpoint.export=false"]) == 0
    capsys.readouterr()
    words = ["name=second", "after=bare", f"model.path={workdir}/runs/bare/export"]
    assert main(["submit", "cfg.yaml", SLURM, *words]) == ExitCode.BAD_INPUT
    assert "run bare will not write it: its checkpoint.export is false" in capsys.readouterr().err


def test_a_sweep_is_no_run_but_has_some(
    workdir: Path, parent: RunPaths, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.add("scontrol", "echo 'MaxJobCount = 10000'")
    config = Path("cfg.yaml").read_text()
    Path("cfg.yaml").write_text(f"{config}sweep: {{product: {{train.seed: [1, 2]}}}}\n")
    assert main(["submit", "cfg.yaml", SLURM, "name=swept"]) == 0
    Path("cfg.yaml").write_text(config)
    capsys.readouterr()
    assert main(["submit", "cfg.yaml", SLURM, "name=second", "after=swept"]) == ExitCode.BAD_INPUT
    assert "after: swept is a sweep; name one of its runs: swept-0, swept-1" in capsys.readouterr().err
    assert main(["report", "swept"]) == ExitCode.CONFLICT
    assert "swept is a sweep, and one run is needed: swept-0, swept-1" in capsys.readouterr().err
    assert main(["results", "swept"]) == 0
    assert "swept-1" in capsys.readouterr().out
    assert main(["results", "swept", "--sort=loss"]) == ExitCode.BAD_INPUT
