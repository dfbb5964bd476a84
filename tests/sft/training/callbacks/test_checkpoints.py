"""Which checkpoints are kept while the next one is being written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.contract.rundir import COMPLETE, RunPaths, checkpoint_step
from launcher.contract.spec import CheckpointSpec, RunSpec
from sft.checkpoint.save import Saved
from sft.metrics.run_log import RunLog
from sft.runtime.deadline import Deadline
from sft.runtime.stop import StopFlag
from sft.training.callbacks.checkpoints import CheckpointCallback


class SlowSaver:
    """Stands for the saver of a rank whose disk is slow: a checkpoint is there once somebody waits for it."""

    is_written = False

    def __init__(self) -> None:
        self.path: Path | None = None

    @property
    def in_flight(self) -> bool:
        return self.path is not None

    def finish(self) -> Saved | None:
        if self.path is None:
            return None
        self.path.mkdir(parents=True)
        (self.path / COMPLETE).touch()
        saved, self.path = Saved(self.path, 1.0), None
        return saved


class Run:
    """A run of four steps that are evaluated as `losses` says, whose callback saves every second one."""

    def __init__(self, root: Path, losses: Mapping[int, float]) -> None:
        spec = RunSpec(name="run", checkpoint=CheckpointSpec(every=2, keep_last=1, keep_best=1, asynchronous=True))
        self.log = RunLog(RunPaths(root / "run"), spec, attempt="a.1", max_steps=4, is_writer=True)
        self.log.paths.root.mkdir(exist_ok=True)
        evaluation: Any = SimpleNamespace(
            metrics_at=lambda step: {"eval_loss": losses[step]} if step in losses else {},
            early_stopping=SimpleNamespace(is_due=False),
        )
        guard: Any = SimpleNamespace(failure=None, rewound=False, settle=lambda *_: None)
        self.callback = CheckpointCallback(spec, StopFlag(), Deadline(None, 0.0), None, evaluation, guard, self.log)
        self._saver = SlowSaver()
        control = SimpleNamespace(any_of=list, barrier=lambda: None, from_leader=lambda value: value)
        strategy = SimpleNamespace(saver=self._saver, control=control)
        self.trainer: Any = SimpleNamespace(global_step=0, strategy=strategy, save_checkpoint=self._save)

    def _save(self, path: Path, weights_only: bool) -> None:
        self._saver.path = path

    def kept_after(self, step: int) -> list[int]:
        self.trainer.global_step = step
        self.callback.on_train_batch_end(self.trainer, self.trainer)
        return [checkpoint_step(path) for path in self.log.paths.complete_checkpoints()]


def test_the_best_is_kept_until_a_better_one_is_written(tmp_path: Path) -> None:
    """Seen to fail: at step 3, before its own checkpoint was written, that of step 1 was removed."""
    run = Run(tmp_path, {1: 2.0, 3: 1.0})
    assert [run.kept_after(step) for step in (1, 2, 3, 4)] == [[], [1], [1, 2], [3, 4]]


def test_a_best_step_that_was_not_saved_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a crash during its save and a restart from a copy in memory, which knew of it. Seen to fail: step 3 was
    removed, since step 1 had been better."""
    monkeypatch.setattr(StopFlag, "install", lambda self: None)
    first = Run(tmp_path, {1: 1.0})
    first.kept_after(1)
    again = Run(tmp_path, {3: 2.0})
    again.callback.load_state_dict(first.callback.state_dict())
    again.callback.on_train_start(again.trainer, again.trainer)
    assert [again.kept_after(step) for step in (2, 3, 4)] == [[], [2], [3, 4]]
