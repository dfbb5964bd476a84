"""Two clusters of one site under one slurmdbd: a run on the other cluster is found, ended and never doubled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.manifest import read_manifest
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import Workbench, events, make_workbench
from tests.slurm.test_odd_sites import ALONE
from tests.slurm.test_odd_sites import PYTHON as GOES_ON

pytestmark = pytest.mark.slurm

PYTHON = '#!/bin/bash\n[ "$3" != train ] || exec sleep 600\n'


@pytest.fixture
def other(slurm_with_accounting: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """The cluster beside the one whose login node this is."""
    here = slurm_with_accounting
    with SlurmCluster(tmp_path_factory.mktemp("other"), nodes=2, beside=here) as cluster:
        known = ["sacctmgr", "-n", "-P", "show", "clusters"]
        wait_until(lambda: cluster.layout.cluster_name in here.run(known).stdout, "slurmdbd to know both", timeout=60)
        yield cluster


def jobs_on(cluster: SlurmCluster, name: str) -> dict[str, str]:
    """Id -> state of the jobs of this name that have not ended."""
    lines = cluster.run(["squeue", "-h", f"--name={name}", "-o", "%i %T"]).stdout.splitlines()
    return dict(line.split() for line in lines)


def stub(tmp_path: Path) -> str:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    return f"cluster.runtime.python={python}"


def test_run_on_another_cluster(slurm_with_accounting: SlurmCluster, other: SlurmCluster, tmp_path: Path) -> None:
    bench = make_workbench(tmp_path / "bench", slurm_with_accounting)
    there = other.layout.cluster_name
    run = bench.submit("far", stub(tmp_path), f"resources.extra_sbatch=[--clusters={there}]")
    (job,) = read_manifest(run).jobs
    assert (job.id.cluster, list(jobs_on(other, "far"))) == (there, [job.id.text])
    bench.wait_for_state(run, "RUNNING")
    wait_until(lambda: bench.status(run)["attempt"] is not None, "the attempt to begin", timeout=60, interval=0.5)
    assert bench.status(run)["cluster"] == there
    again = bench.launcher("resubmit", str(run.root), check=False)
    assert (again.returncode, f"is RUNNING as job {job.id.text};{there}" in again.stderr) == (ExitCode.CONFLICT, True)
    assert f"(job {job.id.text};{there})" in bench.launcher("cancel", str(run.root)).stdout
    wait_until(lambda: jobs_on(other, "far") == {}, "the job to end", timeout=60)
    bench.wait_for_state(run, "CANCELLED")
    _environment_names_the_cluster(bench, other, tmp_path)
    _goes_on_as_a_new_job_there(bench, other, tmp_path)
    _races_with_a_job_there(bench, other, tmp_path)


def _goes_on_as_a_new_job_there(bench: Workbench, other: SlurmCluster, tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(GOES_ON)
    python.chmod(0o755)
    (tmp_path / "go-on").touch()
    there = other.layout.cluster_name
    words = ["restart.how=resubmit", f"resources.extra_sbatch=[--clusters={there}]", f"cluster.runtime.python={python}"]
    run = bench.submit("chain", *ALONE, *words)
    wait_until(lambda: len(events(run, "submitted")) == 2, "the run's own submission", timeout=120)
    bench.wait_for_state(run, "COMPLETED")
    assert [event["cluster"] for event in events(run, "submitted")] == [there, there]
    assert [event["cluster"] for event in events(run, "attempt_started")] == [there, there]


def _races_with_a_job_there(bench: Workbench, other: SlurmCluster, tmp_path: Path) -> None:
    """This cluster is full, so the other one has the run, and its job ends the one that waits here."""
    home = tmp_path / "home" / "cluster_configs"
    home.mkdir(parents=True)
    for name, cluster in (("here", bench.cluster), ("there", other)):
        sent = f"resources: {{extra_sbatch: [--clusters={cluster.layout.cluster_name}]}}"
        (home / f"{name}.yaml").write_text(f"scheduler: slurm\nruntime: {{python: {tmp_path}/python}}\n{sent}\n")
    bench.cluster.run(["sbatch", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300"])
    words = ["submit", str(bench.config), "name=raced", *ALONE, "--first-of=here,there"]
    bench.launcher(*words, env={"SFT_LAUNCHER_HOME": str(home.parent)})
    run = bench.run_paths("raced")
    bench.wait_for_state(run, "COMPLETED")
    assert [event["cluster"] for event in events(run, "attempt_started")] == [other.layout.cluster_name]
    assert jobs_on(bench.cluster, "raced") == {}
    assert bench.status(run)["cluster"] == other.layout.cluster_name


def _environment_names_the_cluster(bench: Workbench, other: SlurmCluster, tmp_path: Path) -> None:
    """SLURM_CLUSTERS is used, as sbatch does; and the job is found on that cluster if sbatch's answer is lost."""
    folder = tmp_path / "bin"
    folder.mkdir()
    lost = "echo 'sbatch: error: Socket timed out on send/recv operation' >&2; exit 1"
    (folder / "sbatch").write_text(f'#!/bin/bash\n/usr/bin/sbatch "$@" >/dev/null || exit\n{lost}\n')
    (folder / "sbatch").chmod(0o755)
    env = {"SLURM_CLUSTERS": other.layout.cluster_name, "PATH": f"{folder}:{bench.cluster.env['PATH']}"}
    run = bench.submit("chosen", stub(tmp_path), "resources.extra_sbatch=[--hold]", env=env)
    (job,) = read_manifest(run).jobs
    assert (job.id.cluster, list(jobs_on(other, "chosen"))) == (other.layout.cluster_name, [job.id.text])
    assert bench.state(run) == "HELD"
    waits = bench.launcher("submit", str(bench.config), "name=near", "after=chosen", check=False)
    assert waits.returncode == ExitCode.CONFLICT
    assert f"job {job.id.text} is on cluster {other.layout.cluster_name}" in waits.stderr
    bench.launcher("cancel", str(run.root))
    assert jobs_on(other, "chosen") == {}
