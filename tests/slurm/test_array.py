"""A sweep as a job array on a real Slurm: states, throttle, and elements that keep their run when requeued."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launcher.contract.manifest import read_manifest
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import events, make_workbench

pytestmark = pytest.mark.slurm

PYTHON = '#!/bin/bash\nuntil [ -e "$(dirname "$0")/go-on" ]; do sleep 0.1; done\n'


def test_array(slurm: SlurmCluster, tmp_path: Path) -> None:
    bench = make_workbench(tmp_path / "bench", slurm)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    section = "sweep: {product: {train.seed: [1, 2, 3]}, max_at_once: 2, as: array}\n"
    bench.config.write_text(bench.config.read_text() + section)
    bench.launcher("submit", str(bench.config), "name=swept", f"cluster.runtime.python={python}")
    runs = [bench.run_paths(f"swept-{number}") for number in range(3)]
    jobs = [read_manifest(run).jobs[0].id.text for run in runs]
    assert [job.partition("_")[2] for job in jobs] == ["0", "1", "2"]

    def states() -> list[str]:
        shown = bench.launcher("status", "swept", "--json", f"--run-root={bench.root / 'runs'}").stdout
        return [row["state"] for row in json.loads(shown)]

    wait_until(lambda: states() == ["RUNNING", "RUNNING", "PENDING"], "two of three to run", timeout=120, interval=0.5)
    slurm.run(["scontrol", "requeue", jobs[1]])
    (tmp_path / "go-on").touch()
    wait_until(lambda: states() == ["COMPLETED"] * 3, "all to complete", timeout=180, interval=0.5)
    assert {str(event["job_id"]) for event in events(runs[1], "attempt_started")} == {jobs[1]}
    assert [event["attempt"] for event in events(runs[1], "attempt_started")][-1] == f"{jobs[1]}.1"
    assert len(events(runs[2], "attempt_started")) == 1
