"""Checkpoints and the end of training: when to save, what to keep, when to stop."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import cast

from launcher.contract.errors import RunStateError
from launcher.contract.lease import Keeper
from launcher.contract.rundir import checkpoint_step
from launcher.contract.spec import RunSpec
from sft.checkpoint import files as checkpoint_files
from sft.checkpoint.contents import BestSteps, Comparison, RankedStep
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.runtime.deadline import Deadline
from sft.runtime.stop import StopFlag
from sft.training.callbacks.bad_steps import GuardCallback
from sft.training.callbacks.early_stopping import is_better, measured_on
from sft.training.callbacks.evaluation import EvaluationCallback
from sft.training.strategy import MegatronStrategy


class BestCheckpoints:
    """The best `keep_best` evaluations of a run so far."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec.checkpoint_ranking
        metric = self._spec.best_metric
        self._compared = Comparison(metric, self._spec.best_mode, measured_on(spec, metric))
        self._ranked: list[RankedStep] = []

    @property
    def steps(self) -> list[int]:
        """The steps, best first."""
        return [ranked.step for ranked in self._ranked]

    def offer(self, step: int, value: float) -> bool:
        """Rank an evaluation, and return whether it is among the best. An older one wins a tie."""
        if not self._spec.keep_best or math.isnan(value):
            return False
        better = [ranked for ranked in self._ranked if not is_better(value, ranked.value, self._spec.best_mode)]
        if len(better) >= self._spec.keep_best:
            return False
        worse = [ranked for ranked in self._ranked if ranked not in better]
        self._ranked = [*better, RankedStep(step, value), *worse][: self._spec.keep_best]
        return True

    def state(self, run: str) -> BestSteps:
        """Return what a checkpoint of the run in directory `run` keeps."""
        return BestSteps(run, tuple(self._ranked), self._compared)

    def restore(self, state: BestSteps) -> None:
        """Go on from what `state` gave, with as many as are kept now, unless something else was compared."""
        # A run that goes on with other settings may have changed it: old values would be taken for those of the new.
        if state.compared.agrees(self._compared):
            self._ranked = list(state.best)[: self._spec.keep_best]

    def keep_only(self, steps: Collection[int]) -> None:
        """Forget all others: without its checkpoint a step would only keep worse ones from being kept."""
        self._ranked = [ranked for ranked in self._ranked if ranked.step in steps]


class CheckpointCallback(pl.Callback):
    """Saves every `checkpoint.every` steps, after a good evaluation or a rewind, at the end, and before a stop.

    It is the last of the callbacks, so that the checkpoint has the states of the others after this step.
    """

    def __init__(
        self,
        spec: RunSpec,
        stop: StopFlag,
        deadline: Deadline,
        lease: Keeper | None,
        evaluation: EvaluationCallback,
        guard: GuardCallback,
        log: RunLog,
    ) -> None:
        self._spec = spec.checkpoint_ranking
        self._stop = stop
        self._deadline = deadline
        self._lease = lease
        self._evaluation = evaluation
        self._guard = guard
        self._log = log
        self._best = BestCheckpoints(spec)
        self._best_of_save: list[int] = []
        """The best as the save in flight, or the last one, knows them."""

    @property
    def state_key(self) -> str:
        return BestSteps.KEY

    def state_dict(self) -> dict[str, object]:
        return self._best.state(str(self._log.paths.root)).to_json()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        state = BestSteps.from_json(state_dict)
        if state.run == str(self._log.paths.root):  # else they are another run's, and not ours to keep
            self._best.restore(state)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._stop.install()
        strategy = cast(MegatronStrategy, trainer.strategy)
        complete = [checkpoint_step(path) for path in self._log.paths.complete_checkpoints()]
        # As the leader sees them: what is kept decides when to save, which all ranks do together.
        self._best.keep_only(strategy.control.from_leader(complete))
        if self._lease is not None:
            strategy.saver.may_write = self._lease.confirm

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        strategy = cast(MegatronStrategy, trainer.strategy)
        step = trainer.global_step
        writing = strategy.saver.in_flight and not strategy.saver.is_written
        self._deadline.step_ended()
        late = self._log.is_writer and self._deadline.is_due  # rank 0's clock decides for all
        lost = self._lease is not None and self._lease.lost
        asked, late, lost, unwritten = strategy.control.any_of([bool(self._stop), late, lost, writing])
        if lost:
            raise RunStateError(f"another attempt has taken over run {self._log.paths.name}; this one writes no more")
        if not unwritten:
            self._finish(strategy)
        value = self._evaluation.metrics_at(step).get(self._spec.best_metric, math.nan)
        is_good = self._best.offer(step, value)
        ends = asked or late or self._guard.failure is not None or self._evaluation.early_stopping.is_due
        if ends:
            self._guard.settle(strategy, step)
        last = ends or step == self._log.max_steps
        due = self._spec.every is not None and step % self._spec.every == 0
        # After a rewind, because a restart would go on from the newest checkpoint, with what was taken back.
        if last or is_good or due or self._guard.rewound:
            self._save(trainer, strategy, step, wait=last)
        if ends:
            trainer.should_stop = True
        if (asked or late) and step < self._log.max_steps:
            self._say_why(step, asked)
        self._deadline.step_begins()

    def _say_why(self, step: int, asked: bool) -> None:
        """Say why training stops: by a signal, or by the clock where there was none."""
        if asked:
            self._log.say(f"stopping after step {step} as asked ({self._stop.signal_name or 'by another rank'})")
        else:
            self._log.say(f"stopping after step {step}: the job ends within {self._deadline.needed:.0f} s")
        self._log.event("stop_requested", step=step, signal=self._stop.signal_name, deadline=not asked)

    def _save(self, trainer: pl.Trainer, strategy: MegatronStrategy, step: int, *, wait: bool) -> None:
        self._finish(strategy)  # at most one save in flight
        trainer.save_checkpoint(self._log.paths.checkpoint(step), weights_only=False)
        self._best_of_save = self._best.steps
        if wait or not self._spec.asynchronous:
            self._finish(strategy)

    def _finish(self, strategy: MegatronStrategy) -> None:
        """Wait for the save in flight, if there is one, then remove the checkpoints that are no longer kept."""
        saved = strategy.saver.finish()
        if saved is None:
            return
        # Not those of now: an evaluation since then may have found a better step, of which nothing is written yet.
        best = self._best_of_save
        if self._log.is_writer:
            # Checkpoints of later steps are damaged ones: otherwise the run would have resumed from them.
            complete = [
                path
                for path in self._log.paths.complete_checkpoints()
                if checkpoint_step(path) <= checkpoint_step(saved.path)
            ]
            keep = complete[-self._spec.keep_last :] + [self._log.paths.checkpoint(step) for step in best]
            checkpoint_files.remove_all_but(complete, keep)
        strategy.control.barrier()
        self._deadline.saved(saved.seconds)
        self._log.checkpoint_saved(saved.path.name)
        seconds = round(saved.seconds, 3)
        self._log.event("checkpoint_saved", step=checkpoint_step(saved.path), seconds=seconds, best=best)
