"""What only sacct knows."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster
from tests.slurm.matrix import decided
from tests.slurm.processes import wait_until
from tests.slurm.runs import loss_curve, make_workbench
from tests.slurm.test_faults import killed_rank

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1800)]


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


def test_requeued_run_where_squeue_forgets_at_once(
    slurm_with_accounting: SlurmCluster, undisturbed: RunPaths, tmp_path: Path
) -> None:
    """One row of the fault matrix; all of them are run with sacct in the slow tier."""
    run = killed_rank(make_workbench(tmp_path, slurm_with_accounting))
    assert decided(run) == [("unknown", "requeue"), ("done", "stop")]
    assert loss_curve(run) == loss_curve(undisturbed)
