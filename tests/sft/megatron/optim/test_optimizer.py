"""The learning rate is a function of the step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from launcher.contract.spec import OptimizerSpec
from sft.megatron.optim.optimizer import build_scheduler


def rates(spec: OptimizerSpec, max_steps: int) -> list[float]:
    """Learning rate of each step."""
    optimizer = SimpleNamespace(param_groups=[{"max_lr": spec.lr, "min_lr": spec.min_lr}])
    schedule = build_scheduler(spec, optimizer, max_steps)
    found = []
    for step in range(max_steps):
        schedule.num_steps = step
        schedule.step(0)
        found.append(optimizer.param_groups[0]["lr"])
    return found


def test_cosine_with_warmup() -> None:
    found = rates(OptimizerSpec(lr=1.0, min_lr=0.1, warmup_steps=2), 10)
    assert found[:3] == pytest.approx([0.0, 0.5, 1.0])
    assert found[6] == pytest.approx(0.55)  # halfway from step 2 to step 10
    assert found == [*found[:2], *sorted(found[2:], reverse=True)]


def test_linear_without_warmup() -> None:
    assert rates(OptimizerSpec(lr=1.0, schedule="linear"), 4) == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_constant_after_warmup() -> None:
    found = rates(OptimizerSpec(lr=2.0, min_lr=0.5, schedule="constant", warmup_steps=2), 5)
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])
