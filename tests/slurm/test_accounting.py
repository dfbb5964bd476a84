"""What only sacct knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import make_workbench

pytestmark = pytest.mark.slurm


def test_status_asks_sacct_for_a_job_that_squeue_forgot(slurm_with_accounting: SlurmCluster, tmp_path: Path) -> None:
    """Cancelled by hand before it began, a run has no event of its own that says so."""
    cluster = slurm_with_accounting
    bench = make_workbench(tmp_path, cluster)
    cluster.run(["sbatch", "-N2", "--exclusive", "--output=/dev/null", "--wrap", "sleep 300"])
    run = bench.submit("forgotten")
    job = bench.status(run)["job"]
    cluster.run(["scancel", job])
    wait_until(lambda: cluster.job_state(job) == "", "squeue to forget the job", timeout=60, interval=1)
    assert bench.state(run) == "CANCELLED"
