"""The learning rates of a NeMo config are NeMo's, step by step."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.nemo.convert import convert
from launcher.contract.spec import OptimizerSpec
from sft.megatron.optim.schedule import Schedule


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 40),
    hold=st.integers(0, 400),
    rate=st.floats(1e-6, 1e-3),
    floor=st.floats(0, 1),
)
def test_schedule_is_nemos(steps: int, warmup: int, hold: int, rate: float, floor: float) -> None:
    """Against the rule of NeMo's CosineAnnealing, step by step, through Megatron-core's scheduler."""
    lowest = floor * rate
    for step, found in enumerate(imported_rates(steps, warmup, hold, rate, lowest)):
        assert found == pytest.approx(nemo_rate(step, steps, warmup, hold, rate, lowest), rel=1e-9), step


def imported_rates(steps: int, warmup: int, hold: int, rate: float, lowest: float) -> list[float]:
    """Our learning rate of every step, of a NeMo config that is imported."""
    schedule = {"name": "CosineAnnealing", "warmup_steps": warmup, "constant_steps": hold, "min_lr": lowest}
    optim = {"lr": rate, "sched": schedule}
    text = yaml.safe_dump({"trainer": {"devices": 1, "max_steps": steps}, "model": {"optim": optim}})
    prefix = "train.optimizer."
    found = {
        key.removeprefix(prefix): value
        for key, value, _ in convert(text, "nemo.yaml").settings()
        if key.startswith(prefix)
    }
    spec = OptimizerSpec(**found)  # type: ignore[arg-type]
    group: dict[str, float] = {}
    optimizer: Any = SimpleNamespace(param_groups=[group])
    scheduler = Schedule(spec, optimizer, steps)
    rates = []
    for step in range(steps):
        scheduler.num_steps = step
        scheduler.step(0)
        rates.append(group["lr"])
    return rates


def nemo_rate(step: int, steps: int, warmup: int, hold: int, rate: float, lowest: float) -> float:
    """NeMo 2.7.3: a warm-up, which starts at 0 only where there are constant steps; a cosine; the lowest rate."""
    if warmup and step <= warmup:
        return rate * step / warmup if hold else rate * (step + 1) / (warmup + 1)
    decay = steps - hold - warmup
    if step > warmup + decay or decay <= 0:
        return lowest
    return lowest + (rate - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))
