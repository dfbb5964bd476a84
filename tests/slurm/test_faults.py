"""The fault matrix: a run that is interfered with ends with the loss curve of one that was not, bit by bit.

Each test also asserts what the run itself says of it: the cause of each interruption and the decision, which is what
`status --why` shows.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.rundir import RunPaths, checkpoint_step
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import pids_with, wait_until
from tests.slurm.runs import STEPS, Workbench, events, loss_curve, wait_for_checkpoint

pytestmark = pytest.mark.slurm


def decided(run: RunPaths) -> list[tuple[str, str]]:
    """Cause and decision of every attempt so far."""
    return [(event["cause"], event["decision"]) for event in events(run, "restart_decided")]


def wait_for_decisions(run: RunPaths, count: int, timeout: float = 120) -> dict[str, Any]:
    wait_until(lambda: len(decided(run)) >= count, f"{count} decisions of {run.name}", timeout=timeout)
    return events(run, "restart_decided")[count - 1]


def started_after(run: RunPaths) -> list[int]:
    """Steps that were done when each attempt began to train."""
    return [event["step"] for event in events(run, "training_started")]


def stopped_after(run: RunPaths) -> list[int]:
    return [event["step"] for event in events(run, "stop_requested")]


def rank_process(job: str, rank: int) -> int:
    """The Python process of a rank in the training step."""
    for pid in pids_with({"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_NTASKS": "4"}):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"train" in words and b"python" in words[0]:
            return pid
    raise AssertionError(f"no process of rank {rank} in job {job}")


def test_killed_rank(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    run = bench.submit("killed-rank")
    wait_for_checkpoint(run)
    os.kill(rank_process(bench.status(run)["job"], 2), signal.SIGKILL)
    wait_for_decisions(run, 1)
    bench.wait_for_state(run, "COMPLETED")
    assert decided(run) == [("unknown", "requeue"), ("done", "stop")]
    assert loss_curve(run) == loss_curve(uninterrupted)
    why = bench.launcher("status", "--why", str(run.root)).stdout
    assert "killed by signal 9" in why
    assert "this restart is free [2 of 2 restarts left]" in why
    assert not run.lease.exists()


def test_preemption(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    """With notice: not a step is lost."""
    run = bench.submit("preempted")
    wait_for_checkpoint(run)
    node = slurm.nodes_of(bench.status(run)["job"])[0]
    slurm.run(["sbatch", "-N1", "--exclusive", "--partition=urgent", f"--nodelist={node}", "--wrap", "sleep 1"])
    wait_for_decisions(run, 1)
    bench.wait_for_state(run, "COMPLETED")
    assert decided(run) == [("preempted", "leave"), ("done", "stop")]
    assert started_after(run) == [0, *stopped_after(run)]
    assert loss_curve(run) == loss_curve(uninterrupted)


@pytest.mark.parametrize("how", ["requeue", pytest.param("resubmit", marks=pytest.mark.slow)])
def test_time_limit_twice(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster, how: str) -> None:
    """Ranks stop by themselves: the signal would come only a second before the end, and not a step is lost."""
    limits = ["resources.time=2", "resources.signal_seconds=110", "resources.extra_sbatch=[--signal=USR2@1]"]
    run = bench.submit(f"time-{how}", *limits, f"restart.how={how}")
    for count in (1, 2):
        event = wait_for_decisions(run, count)
        assert (event["cause"], event["decision"]) == ("timeout", how)
    wait_until(lambda: bench.state(run) == "PENDING", "the third attempt to wait", timeout=30)
    slurm.run(["scontrol", "update", f"JobId={bench.status(run)['job']}", "TimeLimit=10"])
    bench.wait_for_state(run, "COMPLETED")
    assert len(stopped_after(run)) == 2
    assert started_after(run) == [0, *stopped_after(run)]
    assert loss_curve(run) == loss_curve(uninterrupted)
    assert len({event["job_id"] for event in events(run, "attempt_started")}) == (1 if how == "requeue" else 3)


def test_lost_batch_node(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    """The node of the batch script takes with it who could say how it ended; the next attempt does."""
    run = bench.submit("lost-node")
    wait_for_checkpoint(run)
    lost = slurm.nodes_of(bench.status(run)["job"])[0]
    slurm.kill_node(lost)
    try:
        wait_for_decisions(run, 1)
        bench.wait_for_state(run, "COMPLETED")
    finally:
        slurm.start_node(lost)
    assert decided(run) == [("node_failure", "leave"), ("done", "stop")]
    assert len(events(run, "lease_taken_over")) == 1
    assert loss_curve(run) == loss_curve(uninterrupted)


def test_scancel_and_damaged_checkpoint(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    run = bench.submit("scancelled")
    wait_until(lambda: len(run.complete_checkpoints()) == 2, "two checkpoints", timeout=120, interval=0.05)
    slurm.run(["scancel", bench.status(run)["job"]])
    wait_for_decisions(run, 1)
    bench.wait_for_state(run, "CANCELLED")
    assert decided(run) == [("cancelled", "stop")]
    older, newest = run.complete_checkpoints()
    largest = max((file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    bench.launcher("resubmit", str(run.root))
    bench.wait_for_state(run, "COMPLETED")
    assert started_after(run) == [0, checkpoint_step(older)]
    assert loss_curve(run) == loss_curve(uninterrupted)


def test_restarted_controller(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    run = bench.submit("controller")
    wait_for_checkpoint(run)
    slurm.restart_controller()
    bench.wait_for_state(run, "COMPLETED")
    assert decided(run) == [("done", "stop")]
    assert started_after(run) == [0]
    assert loss_curve(run) == loss_curve(uninterrupted)


@pytest.fixture
def small_disk(tmp_path: Path, slurm: SlurmCluster) -> Iterator[Path]:
    """A file system of 100 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if slurm.run(["mount", "-t", "tmpfs", "-o", "size=100m", "tmpfs", str(disk)], check=False).returncode != 0:
        pytest.skip("this machine lets nobody mount a file system")
    yield disk
    slurm.run(["umount", "--lazy", str(disk)])


def test_full_disk(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster, small_disk: Path) -> None:
    cache = f"data.cache_dir={bench.root / 'runs' / '.cache'}"
    bench.submit("full", f"run_root={small_disk}", cache)
    run = RunPaths(small_disk / "full")
    wait_for_checkpoint(run)
    filler = small_disk / "filler"
    left = os.statvfs(small_disk)
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, left.f_bavail * left.f_frsize - 2**20)
    wait_for_decisions(run, 1)
    bench.wait_for_state(run, "FAILED")
    assert decided(run) == [("disk_full", "stop")]
    filler.unlink()
    bench.launcher("resubmit", str(run.root))
    bench.wait_for_state(run, "COMPLETED")
    assert loss_curve(run) == loss_curve(uninterrupted)


RAISING = """\
calls = []


def metric(*, samples, prompts, outputs):
    calls.append(1)
    if len(calls) == 2:
        raise ZeroDivisionError("the user's own mistake")
    return {"length": 1.0}
"""


def test_user_code_that_raises_is_not_started_again(
    bench: Workbench, slurm: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "users_metric.py").write_text(RAISING)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello"}\n')
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # sbatch hands it on
    metric = ["evaluation.metric=users_metric:metric", f"evaluation.prompts={tmp_path}/prompts.jsonl"]
    run = bench.submit("raising", *metric, "train.eval_every=7", "evaluation.max_new_tokens=1")
    wait_for_decisions(run, 1)
    bench.wait_for_state(run, "FAILED")
    assert decided(run) == [("user_code", "stop")]
    assert "ZeroDivisionError: the user's own mistake" in events(run, "restart_decided")[0]["detail"]
    assert max(loss_curve(run)) == 7 < STEPS
    assert len(events(run, "attempt_started")) == 1


def test_second_job_of_a_run_refuses(bench: Workbench, slurm: SlurmCluster) -> None:
    """Submitted behind the launcher's back."""
    run = bench.submit("twice")
    wait_until(lambda: bool(events(run, "attempt_started")), "the first job to begin", timeout=60)
    second = slurm.run(["sbatch", "--parsable", str(run.script)]).stdout.strip()
    slurm.wait_for_job(second, {"FAILED"})
    shown = slurm.run(["scontrol", "show", "job", "-o", second]).stdout
    assert "ExitCode=4:0" in shown
    (refusal,) = events(run, "lease_refused")
    first = events(run, "attempt_started")[0]["attempt"]
    assert f"held by attempt {first}" in refusal["reason"]
    assert len(events(run, "attempt_started")) == 1
