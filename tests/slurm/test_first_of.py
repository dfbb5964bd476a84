"""`submit --first-of` on a real Slurm: jobs that start at the same moment, and one that starts alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.contract import race
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import Workbench, events, make_workbench
from tests.slurm.test_odd_sites import ALONE, jobs_named, site

pytestmark = pytest.mark.slurm


@pytest.fixture
def bench(slurm: SlurmCluster, tmp_path: Path) -> Workbench:
    return make_workbench(tmp_path / "bench", slurm)


@pytest.mark.parametrize("races", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_jobs_that_start_at_the_same_moment(bench: Workbench, races: int) -> None:
    """All nodes are free: both jobs start, and one of them writes."""
    python, _ = site(bench, "site")
    (bench.root / "site" / "once").touch()
    (bench.root / "site" / "go-on").touch()
    for number in range(races):
        run = bench.run_paths(f"race{number}")
        words = [f"name={run.name}", *ALONE, python, "--first-of=main,urgent"]
        bench.launcher("submit", str(bench.config), *words)
        bench.wait_for_state(run, "COMPLETED")
        wait_until(lambda run=run: _is_over(bench, run), "both jobs to end", timeout=60)  # type: ignore[misc]
        assert len(events(run, "attempt_started")) == len(events(run, "race_won")) == 1
        assert (
            events(run, "attempt_started")[0]["job_id"]
            == race.entries(events(run, "submitted"))[str(race.winner(run))]["job_id"]
        )
        assert len((bench.root / "site" / "seen").read_text().splitlines()) == number + 1


def _is_over(bench: Workbench, run: RunPaths) -> bool:
    return all(
        bench.cluster.job_state(job) not in ("PENDING", "RUNNING", "COMPLETING") for job in jobs_named(bench, run.name)
    )


@pytest.mark.slow
def test_the_one_that_waits_is_cancelled(bench: Workbench, slurm: SlurmCluster) -> None:
    """And the run goes on after a requeue with the winner's settings, whose job the launcher knows."""
    python, _ = site(bench, "site")
    blocker = slurm.run(
        ["sbatch", "--parsable", "-N4", "--exclusive", "-p", "urgent", "-o/dev/null", "--wrap", "sleep 300"]
    ).stdout.strip()
    slurm.wait_for_job(blocker, {"RUNNING"})
    run = bench.run_paths("waits")
    bench.launcher("submit", str(bench.config), "name=waits", *ALONE, python, "--first-of=main,urgent")
    first, second = (job.id.text for job in read_manifest(run).jobs)
    status = bench.status(run)
    assert (status["state"], status["job"]) == ("PENDING", first)
    assert status["reason"].startswith("first of 2 to start: ")
    slurm.run(["scontrol", "hold", first])
    assert bench.state(run) == "HELD"
    slurm.run(["scancel", blocker])
    bench.wait_for_state(run, "RUNNING")
    assert bench.status(run)["job"] == second
    slurm.wait_for_job(first, {"CANCELLED"})
    (bench.root / "site" / "go-on").touch()  # its first attempt asks to be requeued
    bench.wait_for_state(run, "COMPLETED")
    assert [event["attempt"] for event in events(run, "attempt_started")] == [f"{second}.0", f"{second}.1"]
    assert "#SBATCH --partition=urgent" in race.script_of(run).read_text()
