"""A schedule of transformers, imported, is that schedule step by step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import get_scheduler

from launcher.contract.spec import OptimizerSpec
from launcher.contract.trainers.convert import convert, recognised
from sft.megatron.optim.schedule import Schedule

STEPS, RATE = 40, 3e-4
KWARGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cosine": {},
    "constant": {},
    "constant_with_warmup": {},
    "cosine_with_restarts": {"num_cycles": 3},
    "polynomial": {"power": 2.0, "lr_end": 1e-5},
    "inverse_sqrt": {},
    "cosine_with_min_lr": {"min_lr_rate": 0.2},
    "warmup_stable_decay": {"num_decay_steps": 9, "decay_type": "1-sqrt"},
}


@pytest.mark.parametrize("name", KWARGS)
def test_imported_schedule(name: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    theirs = get_scheduler(name, optimizer, 5, STEPS, scheduler_specific_kwargs=KWARGS[name])
    written = {
        "model_name_or_path": "a",
        "max_steps": STEPS,
        "learning_rate": RATE,
        "lr_scheduler_type": name,
        "lr_scheduler_kwargs": KWARGS[name],
        "warmup_steps": 5,
    }
    text = yaml.safe_dump(written)
    trainer = recognised(text)
    assert trainer is not None
    prefix = "train.optimizer."
    settings = {
        key.removeprefix(prefix): value
        for key, value, _ in convert(text, "sft.yaml", trainer, 1).settings()
        if key.startswith(prefix)
    }
    group: dict[str, float] = {}
    inner: Any = SimpleNamespace(param_groups=[group])
    ours = Schedule(OptimizerSpec(**settings), inner, STEPS)  # type: ignore[arg-type]
    for step in range(STEPS):
        ours.num_steps = step
        ours.step(0)
        assert group["lr"] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), step
        optimizer.step()
        theirs.step()
