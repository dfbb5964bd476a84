"""What only sacct knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster
from tests.slurm.matrix import decided
from tests.slurm.processes import wait_until
from tests.slurm.runs import loss_curve, make_workbench
from tests.slurm.test_faults import killed_rank
from tests.slurm.test_odd_sites import ALONE, site

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


@pytest.mark.slow  # like the rest of the matrix with sacct
def test_requeued_run_where_squeue_forgets_at_once(
    slurm_with_accounting: SlurmCluster, undisturbed: RunPaths, tmp_path: Path
) -> None:
    """The fault matrix asks the controller longer for a job that has ended."""
    run = killed_rank(make_workbench(tmp_path, slurm_with_accounting))
    assert decided(run) == [("unknown", "requeue"), ("done", "stop")]
    assert loss_curve(run) == loss_curve(undisturbed)


GPUS = 2


def test_usage_is_what_sacct_says(slurm_with_accounting: SlurmCluster, tmp_path: Path) -> None:
    """Each start of each job once: one that was requeued, one that was cancelled, one that never began."""
    cluster = slurm_with_accounting
    bench = make_workbench(tmp_path / "bench", cluster)
    words = [*ALONE, f"resources.gpus_per_node={GPUS}", f"resources.tasks_per_node={GPUS}"]
    python, _ = site(bench, "site")
    again = bench.submit("again", *words, python)  # its first attempt asks to be requeued
    held = bench.submit("held", *words, python, "resources.extra_sbatch=[--hold]")
    (bench.root / "site" / "go-on").touch()
    bench.wait_for_state(again, "COMPLETED")
    (bench.root / "site" / "go-on").unlink()
    ended = bench.submit("ended", *words, python)
    wait_until(lambda: len((bench.root / "site" / "seen").read_text().splitlines()) == 3 * GPUS, "ranks", timeout=60)
    job = bench.status(ended)["job"]
    elapsed = ["squeue", "--noheader", f"--jobs={job}", "--format=%M"]
    # Slurm counts whole seconds, and the other attempts may end within the one in which they began.
    wait_until(lambda: cluster.run(elapsed).stdout.strip() > "0:00", "a whole second", timeout=60)
    bench.launcher("cancel", str(ended.root))
    bench.wait_for_state(ended, "CANCELLED")
    bench.launcher("cancel", str(held.root))
    cluster.run(["srun", "--gpus-per-node=1", "--job-name=foreign", "sleep", "2"])

    def by_sacct() -> list[tuple[str, int]]:
        fields = ["sacct", "-X", "-D", "-n", "-P", "--name=again,held,ended", "--format=JobName,ElapsedRaw,State"]
        lines = [line.split("|") for line in cluster.run(fields).stdout.splitlines()]
        return [(name, int(seconds)) for name, seconds, state in lines if state != "RUNNING"]

    def told() -> dict[str, Any]:
        return dict(json.loads(bench.launcher("usage", "--run-root", str(again.root.parent), "--json").stdout))

    def all_ended() -> bool:
        return len(by_sacct()) >= 3 and all(use["cause"] != "running" for use in told()["attempts"])

    wait_until(all_ended, "sacct to know all ends", timeout=60, interval=1)
    usage, seconds = told(), sum(seconds for _, seconds in by_sacct())
    assert seconds > 0
    assert usage["total"]["gpu_hours"] == pytest.approx(GPUS * seconds / 3600)
    assert {use["source"] for use in usage["attempts"]} == {"accounting"}
    assert [(use["run"], use["attempt"] is not None, use["gpus"]) for use in usage["attempts"]] == [
        ("again", True, GPUS),
        ("again", True, GPUS),
        ("ended", True, GPUS),
    ]
