"""Which checkpoints are kept while the next one is being written."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


def test_the_best_is_kept_until_a_better_one_is_written(tmp_path: Path) -> None:
    """Seen to fail: at step 3, before its own checkpoint was written, that of step 1 was removed."""
    spec = RunSpec(name="run", checkpoint=CheckpointSpec(every=2, keep_last=1, keep_best=1, asynchronous=True))
    log = RunLog(RunPaths(tmp_path / "run"), spec, attempt="a.1", max_steps=4, is_writer=True)
    log.paths.root.mkdir()
    values = {1: {"eval_loss": 2.0}, 3: {"eval_loss": 1.0}}
    evaluation: Any = SimpleNamespace(
        metrics_at=lambda step: values.get(step, {}), early_stopping=SimpleNamespace(is_due=False)
    )
    guard: Any = SimpleNamespace(failure=None, rewound=False, settle=lambda *_: None)
    callback = CheckpointCallback(spec, StopFlag(), Deadline(None, 0.0), None, evaluation, guard, log)
    saver = SlowSaver()
    control = SimpleNamespace(any_of=list, barrier=lambda: None)

    def save(path: Path, weights_only: bool) -> None:
        saver.path = path

    trainer: Any = SimpleNamespace(
        global_step=0, strategy=SimpleNamespace(saver=saver, control=control), save_checkpoint=save
    )
    kept = []
    for step in (1, 2, 3, 4):
        trainer.global_step = step
        callback.on_train_batch_end(trainer, trainer)
        kept.append([checkpoint_step(path) for path in log.paths.complete_checkpoints()])
    assert kept == [[], [1], [1, 2], [3, 4]]
