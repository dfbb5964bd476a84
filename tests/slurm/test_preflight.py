"""A bad node on a real Slurm: found before training, named, and kept away from afterwards."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.exit_codes import ExitCode
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import events, loss_curve, make_workbench

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

BAD = "node2"

PYTHON = f"""#!/bin/bash
# Python on every node; on one of them with a /dev/shm that is too small, as containers often have it.
[ "${{SLURMD_NODENAME-}}" != {BAD} ] ||
  exec unshare -m sh -c 'mount -t tmpfs -o size=8M tmpfs /dev/shm && exec "$@"' sh {sys.executable} "$@"
exec {sys.executable} "$@"
"""


def test_a_bad_node_is_named_and_kept_away_from(slurm: SlurmCluster, tmp_path: Path) -> None:
    bench = make_workbench(tmp_path, slurm)
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    steps = ("train.max_steps=8", "checkpoint.export=false")
    look = ("preflight.enabled=auto", "preflight.min_shm_mib=64", "preflight.timeout_seconds=120")
    run = bench.submit("bad-node", *steps, *look, f"cluster.runtime.python={python}")
    undisturbed = bench.submit("undisturbed", *steps)
    wait_until(lambda: bool(events(run, "attempt_ended")), "the preflight to end the run", timeout=250)
    (failed,) = events(run, "preflight_failed")
    assert [node["host"] for node in failed["nodes"]] == [BAD], bench.log(run)
    assert [check["name"] for check in failed["nodes"][0]["checks"]] == ["shm"]
    assert events(run, "attempt_ended")[0]["exit_code"] == ExitCode.BAD_NODE
    assert not events(run, "training_started")
    assert "shm: " in bench.log(run) and f"{BAD}  FAILED" in bench.log(run)
    assert json.loads(run.preflight(failed["attempt"]).read_text())["nodes"][0]["checks"][0]["ok"] is True

    slurm.wait_for_job(str(bench.status(run)["job"]), {"FAILED"})
    bench.launcher("resubmit", str(run.root))
    (row,) = json.loads(bench.launcher("nodes", "--json").stdout)
    assert (row["host"], row["kind"], row["excluded"]) == (BAD, "preflight", True)
    bench.wait_for_state(run, "COMPLETED", timeout=250)
    bench.wait_for_state(undisturbed, "COMPLETED", timeout=250)
    saved = json.loads(run.preflight(events(run, "attempt_started")[-1]["attempt"]).read_text())
    assert BAD not in [node["host"] for node in saved["nodes"]]
    assert all(check["ok"] for node in saved["nodes"] for check in node["checks"])
    assert loss_curve(run) == loss_curve(undisturbed)
