"""How a program is started beside ranks: the step, and the Python that it runs in."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.errors import RunStateError, SchedulerError
from launcher.contract.job import Job, JobId
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, ModelSpec, RunSpec, RuntimeSpec
from launcher.scheduler.factory import scheduler_of
from launcher.submission.render_script import python_beside
from tests.launcher.conftest import Commands

ARRAY = Job(id=JobId("20_3", "slurm"), submitted_at=0.0)


def beside(runtime: RuntimeSpec, root: Path) -> tuple[list[str], list[str]]:
    spec = RunSpec(
        name="run",
        run_root=str(root),
        model=ModelSpec(path=str(root / "model")),
        cluster=ClusterSpec(scheduler="slurm", runtime=runtime, srun_args=["--mpi=none"]),
    )
    return python_beside(spec, RunPaths(root / "run"), "/env/bin/python")


def test_the_rank_s_container_and_else_our_python(tmp_path: Path) -> None:
    assert beside(RuntimeSpec(kind="conda", path="env"), tmp_path) == (["--mpi=none"], ["/env/bin/python"])
    options, python = beside(RuntimeSpec(kind="pyxis", image="ngc"), tmp_path)
    assert options[:2] == ["--mpi=none", "--container-image=ngc"]
    assert f"{tmp_path}/run:{tmp_path}/run" in options[2]
    assert python == ["python"]
    options, python = beside(RuntimeSpec(kind="apptainer", image="x.sif"), tmp_path)
    assert (options, python[:2], python[-2:]) == (["--mpi=none"], ["apptainer", "exec"], ["x.sif", "python"])


def test_a_step_that_overlaps(commands: Commands) -> None:
    """srun takes an array's element by its own number."""
    commands.add("squeue", "echo 23")
    assert scheduler_of("slurm").beside(ARRAY, ["n1", "n2"], ["--mpi=none"]) == [
        *("srun", "--jobid=23", "--overlap", "--export=ALL", "--mpi=none"),
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--nodelist=n1,n2", "--chdir=/"),
    ]
    assert "--jobs=20_3" in commands.calls("squeue")[0]
    assert scheduler_of("slurm").beside(ARRAY, ["n1"], terminal=True)[-1] == "--pty"
    commands.add("squeue", "")
    with pytest.raises(SchedulerError, match="job 20_3 is not running any more"):
        scheduler_of("slurm").beside(ARRAY, ["n1"])


def test_a_job_of_another_cluster(commands: Commands) -> None:
    commands.add("scontrol", "echo 'ClusterName = here'")
    there = Job(id=JobId("7", "slurm", cluster="there"), submitted_at=0.0)
    with pytest.raises(RunStateError, match="from a login node of that cluster"):
        scheduler_of("slurm").beside(there, ["n1"])
