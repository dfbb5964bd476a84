"""Runs on a real Slurm, from submit to the exported model, and what happens when they are interfered with.

The uninterrupted run is made once; every other run has its config and must arrive at its loss curve, bit by bit.
"""

from __future__ import annotations

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths, checkpoint_step
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import STEPS, Workbench, events, loss_curve, wait_for_checkpoint

pytestmark = pytest.mark.slurm


def test_run_completes_with_curve_checkpoint_and_model(uninterrupted: RunPaths, bench: Workbench) -> None:
    curve = loss_curve(uninterrupted)
    assert list(curve) == list(range(1, STEPS + 1))
    assert curve[STEPS][0] < 0.5 * curve[1][0]
    status = bench.status(uninterrupted)
    assert (status["state"], status["step"], status["loss"]) == ("COMPLETED", STEPS, curve[STEPS][0])
    assert (uninterrupted.export / "config.json").is_file()


def test_logs_show_batch_script_and_ranks(uninterrupted: RunPaths, bench: Workbench) -> None:
    assert "ended with exit code 0" in bench.launcher("logs", str(uninterrupted.root), "--batch").stdout
    assert f"step {STEPS}/{STEPS}" in bench.launcher("logs", str(uninterrupted.root)).stdout
    attempt = events(uninterrupted, "attempt_started")[0]["attempt"]
    assert all(uninterrupted.rank_log(attempt, rank).is_file() for rank in range(4))


@pytest.mark.slow  # by default the fault matrix has a run cancelled, and goes on
def test_cancelled_run_goes_on_where_it_stopped(uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster) -> None:
    run = bench.submit("cancelled")
    wait_for_checkpoint(run)
    bench.launcher("cancel", str(run.root))
    bench.wait_for_state(run, "CANCELLED")
    assert events(run, "attempt_ended")[0]["exit_code"] == ExitCode.REQUEUE
    stopped_at = checkpoint_step(run.complete_checkpoints()[-1])
    assert stopped_at < STEPS
    bench.launcher("resubmit", str(run.root))
    bench.wait_for_state(run, "COMPLETED")
    assert [event["step"] for event in events(run, "training_started")] == [0, stopped_at]
    assert loss_curve(run) == loss_curve(uninterrupted)
    assert _weights(run) == _weights(uninterrupted)


@pytest.mark.slow  # by default the fault matrix loses a node, that of the batch script
def test_run_goes_on_elsewhere_after_the_loss_of_a_node(
    uninterrupted: RunPaths, bench: Workbench, slurm: SlurmCluster
) -> None:
    run = bench.submit("node-lost")
    wait_for_checkpoint(run)
    lost = slurm.nodes_of(bench.status(run)["job"])[-1]
    slurm.kill_node(lost)
    try:
        wait_until(lambda: len(events(run, "attempt_started")) == 2, "Slurm to requeue the run", timeout=90)
        bench.wait_for_state(run, "COMPLETED")
    finally:
        slurm.start_node(lost)
    assert loss_curve(run) == loss_curve(uninterrupted)


def test_unreachable_controller_is_exit_3_and_leaves_nothing(bench: Workbench, slurm: SlurmCluster) -> None:
    slurm.stop_controller()
    try:
        result = bench.launcher("submit", str(bench.config), "name=unreachable", check=False)
    finally:
        slurm.start_controller()
    assert result.returncode == ExitCode.SCHEDULER
    assert "Unable to contact slurm controller" in result.stderr
    assert "Traceback" not in result.stderr
    assert not bench.run_paths("unreachable").root.exists()


def _weights(run: RunPaths) -> list[bytes]:
    return [file.read_bytes() for file in sorted(run.export.glob("*.safetensors"))]
