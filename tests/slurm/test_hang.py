"""A rank that stops in the middle of training, on a real Slurm."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from launcher.exit_codes import ExitCode
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import pids_with, wait_until
from tests.slurm.runs import events, make_workbench, wait_for_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]

QUICK = ("watchdog.floor_seconds=15", "watchdog.checkpoint_seconds=60", "train.max_steps=2000", "checkpoint.every=5")


def test_a_stopped_rank_ends_the_run_and_is_named(slurm: SlurmCluster, tmp_path: Path) -> None:
    bench = make_workbench(tmp_path, slurm)
    run = bench.submit("hangs", *QUICK)
    wait_for_checkpoint(run, timeout=250)
    job, last = str(bench.status(run)["job"]), slurm.nodes_of(str(bench.status(run)["job"]))[-1]
    rank_3 = {"SLURM_CONF": slurm.env["SLURM_CONF"], "SLURM_JOB_ID": job, "SLURM_PROCID": "3"}
    for pid in pids_with(rank_3):
        os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: bool(events(run, "attempt_ended")), "the watchdog to end the run", timeout=200)
    (hang,) = events(run, "hang_detected")
    assert [(place["rank"], place["host"], place["answered"]) for place in hang["behind"]] == [(3, last, False)]
    assert "stopped" in hang["behind"][0]["process"]
    assert events(run, "attempt_ended")[0]["exit_code"] == ExitCode.HANG
    assert f"rank 3 on {last} failed first, with exit code 76" in bench.log(run)
    for rank in range(3):
        assert "Thread 0x" in run.stacks(hang["attempt"], rank).read_text()
