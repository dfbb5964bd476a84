"""A mixture of experts whose ranks on two nodes share the experts, on a real Slurm."""

from __future__ import annotations

import pytest

from launcher.contract.rundir import checkpoint_step
from tests.parity.test_families import family_model
from tests.slurm.runs import Workbench, events, loss_curve, wait_for_checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 30


def test_experts_over_two_nodes_go_on_after_a_cancel_as_if_uninterrupted(bench: Workbench) -> None:
    """Each rank has a quarter of the experts. Every rank holding all of them gives the same curve."""
    model = family_model(bench.root / "experts", "qwen3_moe")
    plain = ["topology.tensor_parallel=1", "topology.sequence_parallel=false", "model.hidden_dropout=0"]
    plain += [f"model.path={model}", f"train.max_steps={STEPS}"]
    whole = bench.submit("experts-everywhere", *plain)
    shared = bench.submit("experts-shared", *plain, "topology.expert_parallel=4")
    wait_for_checkpoint(shared)
    bench.launcher("cancel", str(shared.root))
    bench.wait_for_state(shared, "CANCELLED")
    stopped_at = checkpoint_step(shared.complete_checkpoints()[-1])
    assert 0 < stopped_at < STEPS
    bench.launcher("resubmit", str(shared.root))
    bench.wait_for_state(shared, "COMPLETED")
    bench.wait_for_state(whole, "COMPLETED")
    assert [event["step"] for event in events(shared, "training_started")] == [0, stopped_at]
    found, expected = loss_curve(shared), loss_curve(whole)
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    losses = [[loss for loss, _ in curve.values()] for curve in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert found[1] == pytest.approx(expected[1], rel=1e-5)
