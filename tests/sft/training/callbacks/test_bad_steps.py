"""When a step's verdict is waited for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from launcher.contract.rundir import RunPaths
from launcher.contract.spec import CheckpointSpec, RunSpec
from sft.engine.results import StepResult
from sft.metrics.run_log import RunLog
from sft.training.callbacks.bad_steps import GuardCallback


def result(step: int, bad: float) -> StepResult:
    """A step whose update was skipped if `bad` is 1.0."""
    return StepResult(
        step=step,
        loss=torch.tensor(2.0),
        grad_norm=torch.tensor(1.0),
        bad=torch.tensor(bad),
        lr=1e-3,
        examples=1,
        tokens=8,
        squared_lengths=64,
        supervised_tokens=8,
    )


@pytest.mark.parametrize(("copy_every", "seen_after"), [(None, 3), (2, 2)])
def test_a_copy_waits_for_the_verdict_on_its_step(copy_every: int | None, seen_after: int, tmp_path: Path) -> None:
    """Seen to fail: a restart from the copy of a bad step went on without having heard of it."""
    spec = RunSpec(name="run", checkpoint=CheckpointSpec(every=None, copy_every=copy_every))
    log = RunLog(RunPaths(tmp_path / "run"), spec, attempt="a.1", max_steps=9, is_writer=True)
    log.paths.root.mkdir()
    guard = GuardCallback(spec, log, lambda step: [step])
    module: Any = SimpleNamespace(last_step=None)
    trainer: Any = SimpleNamespace(strategy=None)
    guard.setup(trainer, module, "fit")
    failed = {}
    for step in (1, 2, 3):
        module.last_step = result(step, bad=1.0 if step == 2 else 0.0)
        guard.on_train_batch_end(trainer, module)
        failed[step] = guard.failure is not None
    assert failed == {step: step >= seen_after for step in (1, 2, 3)}
