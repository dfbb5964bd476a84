"""cluster init on a real Slurm: what it writes is right, and a run can use it."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from tests.slurm.cluster import SlurmCluster
from tests.slurm.matrix import TWO_RANKS
from tests.slurm.runs import make_workbench

pytestmark = pytest.mark.slurm


def test_a_first_file_is_right_and_a_wrong_one_is_told(
    slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_LAUNCHER_HOME", str(tmp_path / "home"))
    bench = make_workbench(tmp_path, slurm)
    bench.launcher("cluster", "init", "mine")
    file = tmp_path / "home" / "cluster_configs" / "mine.yaml"
    text = file.read_text()
    for line in ("rendezvous: node_addr", "gpus_per_node: 8", "partition: main", "cpus_per_task: 2"):
        assert line in text
    assert bench.launcher("cluster", "check", "mine").stdout == "cluster mine: nothing is wrong\n"

    overrides = ("cluster=mine", "cluster.env.GLOO_SOCKET_IFNAME=lo", "cluster.srun_args=[--mpi=none]")
    run = bench.submit("first", *TWO_RANKS, *overrides, "train.max_steps=2")
    bench.wait_for_state(run, "COMPLETED", timeout=250)

    file.write_text(text.replace("gpus_per_node: 8", "gpus_per_node: 9"))
    wrong = bench.launcher("cluster", "check", "mine", check=False)
    assert wrong.returncode == ExitCode.BAD_INPUT
    assert "resources.gpus_per_node: 9, and nodes of main have 8" in wrong.stderr
    assert "sbatch --test-only" in wrong.stderr
