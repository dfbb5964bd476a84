"""The test cluster itself: what the other Slurm tests take for granted."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import pids_with, wait_until

pytestmark = pytest.mark.slurm


def sbatch(cluster: SlurmCluster, *arguments: str) -> str:
    return cluster.run(["sbatch", "--parsable", "--output=/dev/null", *arguments]).stdout.strip()


def test_tasks_run_on_two_nodes(slurm: SlurmCluster) -> None:
    command = ["srun", "-N2", "--ntasks-per-node=2", "bash", "-c", "echo $SLURMD_NODENAME:$SLURM_PROCID"]
    lines = slurm.run(command).stdout.split()
    assert sorted(lines, key=lambda line: line[-1]) == ["node1:0", "node1:1", "node2:2", "node2:3"]


def test_gpus_are_given_to_tasks(slurm: SlurmCluster) -> None:
    command = ["srun", "-N1", "--gpus-per-node=2", "bash", "-c", "echo $CUDA_VISIBLE_DEVICES"]
    assert slurm.run(command).stdout.strip() == "0,1"


def test_a_job_is_pending_then_running_then_completed(slurm: SlurmCluster, tmp_path: Path) -> None:
    gate = tmp_path / "go"
    blocker = sbatch(slurm, "-N4", "--exclusive", "--wrap", f"until [ -e {gate} ]; do sleep 0.1; done")
    slurm.wait_for_job(blocker, {"RUNNING"})
    waiting = sbatch(slurm, "-N1", "--wrap", "true")
    assert slurm.job_state(waiting) == "PENDING"
    gate.touch()
    slurm.wait_for_job(blocker, {"COMPLETED"})
    slurm.wait_for_job(waiting, {"COMPLETED"})


@pytest.mark.slow  # by default the fault matrix preempts a run
def test_urgent_job_requeues_a_normal_one(slurm: SlurmCluster) -> None:
    normal = sbatch(slurm, "-N4", "--exclusive", "--requeue", "--wrap", "sleep 300")
    slurm.wait_for_job(normal, {"RUNNING"})
    urgent = sbatch(slurm, "-N1", "--exclusive", "--partition=urgent", "--wrap", "true")
    slurm.wait_for_job(urgent, {"COMPLETED"})
    slurm.wait_for_job(normal, {"RUNNING"})
    assert "Restarts=1" in slurm.run(["scontrol", "show", "job", normal]).stdout


@pytest.mark.slow  # by default the fault matrix loses a node
def test_killed_node_goes_down_with_its_processes_and_returns(slurm: SlurmCluster) -> None:
    job = sbatch(slurm, "-N1", "--nodelist=node4", "--no-requeue", "--wrap", "sleep 300")
    slurm.wait_for_job(job, {"RUNNING"})
    slurm.kill_node("node4")
    assert not list(pids_with({"SLURM_CONF": slurm.env["SLURM_CONF"], "SLURMD_NODENAME": "node4"}))
    slurm.wait_for_nodes({"down", "down*"}, ["node4"])
    assert slurm.wait_for_job(job, {"NODE_FAIL"}) == "NODE_FAIL"
    slurm.start_node("node4")
    assert slurm.run(["srun", "--nodelist=node4", "echo", "back"]).stdout.strip() == "back"


def test_jobs_outlive_a_restart_of_the_controller(slurm: SlurmCluster) -> None:
    job = sbatch(slurm, "-N1", "--wrap", "sleep 300")
    slurm.wait_for_job(job, {"RUNNING"})
    slurm.restart_controller()
    assert slurm.job_state(job) == "RUNNING"


def test_two_clusters_side_by_side_and_nothing_left_behind(slurm: SlurmCluster, tmp_path: Path) -> None:
    with SlurmCluster(tmp_path, nodes=1) as other:
        job = sbatch(other, "-N1", "--wrap", "sleep 300")
        other.wait_for_job(job, {"RUNNING"})
        assert slurm.job_state(job) == ""
        conf = other.env["SLURM_CONF"]
        assert len(list(pids_with({"SLURM_CONF": conf}))) > 3
    assert not list(pids_with({"SLURM_CONF": conf}))
    assert slurm.run(["srun", "-N1", "echo", "alive"]).stdout.strip() == "alive"


def test_sacct_answers_where_there_is_accounting(slurm_with_accounting: SlurmCluster) -> None:
    cluster = slurm_with_accounting
    job = sbatch(cluster, "-N2", "--wrap", "exit 7")
    cluster.wait_for_job(job, {"FAILED"})
    sacct = ["sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode"]
    wait_until(lambda: cluster.run(sacct).stdout.strip() == "FAILED|7:0", "sacct to know the job", timeout=30)
