"""The learning rates of a NeMo config are NeMo's, step by step."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher.nemo.convert import convert
from launcher.spec import OptimizerSpec
from sft.megatron.optimizer import build_scheduler


@settings(deadline=None)
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
    text = yaml.safe_dump(
        {
            "trainer": {"devices": 1, "max_steps": steps},
            "model": {
                "optim": {
                    "lr": rate,
                    "sched": {
                        "name": "CosineAnnealing",
                        "warmup_steps": warmup,
                        "constant_steps": hold,
                        "min_lr": lowest,
                    },
                }
            },
        }
    )
    prefix = "train.optimizer."
    found = {
        key.removeprefix(prefix): value
        for key, value, _ in convert(text, "nemo.yaml").settings()
        if key.startswith(prefix)
    }
    spec = OptimizerSpec(**found)  # type: ignore[arg-type]
    group = {"max_lr": spec.lr, "min_lr": spec.lr if spec.schedule == "constant" else spec.min_lr}
    holder = SimpleNamespace(param_groups=[group])
    schedule = build_scheduler(spec, holder, steps)
    for step in range(steps):
        schedule.num_steps = step
        schedule.step(0)
        assert group["lr"] == pytest.approx(nemo_rate(step, steps, warmup, hold, rate, lowest), rel=1e-9), step


def nemo_rate(step: int, steps: int, warmup: int, hold: int, rate: float, lowest: float) -> float:
    """NeMo 2.7.3: a warm-up that is over one step late, a cosine, then the lowest rate."""
    if warmup and step <= warmup:
        return rate * (step + 1) / (warmup + 1)
    decay = steps - hold - warmup
    if step > warmup + decay or decay <= 0:
        return lowest
    return lowest + (rate - lowest) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / decay))
