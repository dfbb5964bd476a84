"""The learning rate is a function of the step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from launcher.contract.errors import ConfigError
from launcher.contract.spec import OptimizerSpec
from sft.megatron.optim.schedule import Schedule


def rates(spec: OptimizerSpec, max_steps: int, group: dict[str, float] | None = None) -> list[float]:
    """Learning rate of each step."""
    optimizer: Any = SimpleNamespace(param_groups=[{} if group is None else group])
    schedule = Schedule(spec, optimizer, max_steps)
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


def test_a_decay_longer_than_the_run_is_refused() -> None:
    """With train.epochs the ranks alone know the steps. It was cut to what there is."""
    spec = OptimizerSpec(schedule="wsd", wsd_steps=8, warmup_steps=2)
    assert len(rates(spec, 10)) == 10
    with pytest.raises(ConfigError, match=r"wsd_steps: 8 is more than the 7 steps after the warm-up$"):
        rates(spec, 9)


def test_a_warm_up_longer_than_the_run_is_begun() -> None:
    spec = OptimizerSpec(lr=1.0, warmup_steps=4)
    assert rates(spec, 4) == pytest.approx([0.0, 0.25, 0.5, 0.75])
    assert rates(spec, 3) == pytest.approx([0.0, 0.25, 0.5])
    longer = OptimizerSpec(lr=1.0, warmup_steps=4, decay_steps=10)
    assert rates(longer, 3) == pytest.approx([0.0, 0.25, 0.5])


def test_constant_after_warmup() -> None:
    found = rates(OptimizerSpec(lr=2.0, schedule="constant", warmup_steps=2), 5)
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])


STEPS = 23
SHAPES: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {
    "linear": ({}, "linear", {}),
    "cosine": ({}, "cosine", {}),
    "constant": ({}, "constant_with_warmup", {}),
    "polynomial": ({"power": 1.7, "min_lr": 1e-4}, "polynomial", {"power": 1.7, "lr_end": 1e-4}),
    "inverse_sqrt": ({"warmup_steps": 3}, "inverse_sqrt", {}),
    "cosine_with_restarts": ({"cycles": 3}, "cosine_with_restarts", {"num_cycles": 3}),
}


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize("name", SHAPES)
def test_schedule_is_transformers(name: str, warmup: int) -> None:
    """Without a warm-up transformers measures inverse_sqrt by 10,000 steps; here it needs one."""
    settings, theirs, kwargs = SHAPES[name]
    warmup = max(warmup, settings.get("warmup_steps", 0))
    spec = OptimizerSpec(lr=2e-3, schedule=name, **{**settings, "warmup_steps": warmup})  # type: ignore[arg-type]
    assert rates(spec, STEPS) == pytest.approx(transformers_rates(theirs, warmup, kwargs), rel=1e-12)


@pytest.mark.parametrize("shape", ["cosine", "linear", "1-sqrt"])
@pytest.mark.parametrize("steps", [None, 7])
def test_wsd_is_transformers(shape: Any, steps: int | None) -> None:
    decay = steps or 3  # a tenth of 23, rounded up
    kwargs = {"num_decay_steps": decay, "decay_type": shape, "min_lr_ratio": 0.25}
    spec = OptimizerSpec(
        lr=2e-3, min_lr=5e-4, schedule="wsd", warmup_ratio=0.1, initial_lr=5e-4, wsd_steps=steps, wsd_decay=shape
    )
    assert rates(spec, STEPS) == pytest.approx(transformers_rates("warmup_stable_decay", 3, kwargs), rel=1e-12)


def transformers_rates(name: str, warmup: int, kwargs: dict[str, Any]) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    scheduler = get_scheduler(name, optimizer, warmup, STEPS, scheduler_specific_kwargs=kwargs)
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("ratio", "steps", "warmup"), [(0.03, 100, 3), (0.07, 100, 7), (0.03, 101, 4), (0.0, 9, 0)])
def test_warmup_is_a_share_of_all_steps(ratio: float, steps: int, warmup: int) -> None:
    """Of the decimal number: as floats, 0.07 * 100 is more than 7."""
    found = rates(OptimizerSpec(lr=1.0, schedule="constant", warmup_ratio=ratio), steps)
    assert [rate < 1 for rate in found].count(True) == warmup


def test_a_multiplier_scales_the_whole_schedule() -> None:
    spec = OptimizerSpec(lr=1.0, min_lr=0.2, initial_lr=0.1, warmup_steps=2, weight_decay=0.5)
    group = {"multiplier": 16.0, "wd_mult": 0.0}
    assert rates(spec, 9, group) == pytest.approx([16 * rate for rate in rates(spec, 9)])
    assert group["weight_decay"] == 0
