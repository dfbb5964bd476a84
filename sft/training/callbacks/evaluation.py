"""Evaluation between steps: held-out loss of each data set, answers to prompts, and early stopping on either.

Lightning's validation loop is not used: it averages over batches. Here every token of a data set counts once, so that
the loss depends on model and data alone and not on the batches.

Every rank has the same numbers: losses are reduced over all ranks, and the metric function's result is sent from rank
0. So each rank decides by itself whether to stop, and all decide alike. The state of early stopping is saved with each
checkpoint, and a resumed run continues from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

from launcher.contract.errors import ConfigError
from launcher.contract.spec import RunSpec
from launcher.contract.topology import Topology
from sft.checkpoint.contents import EarlyStoppingState
from sft.data.prepared.held_out import open_validation_sets
from sft.engine.module import SFTGPT
from sft.megatron.parallel.groups import ControlGroup
from sft.metrics.run_log import RunLog
from sft.runtime import lightning as pl
from sft.training.callbacks.early_stopping import EarlyStopping
from sft.training.datamodule import SFTDataModule, StepBatches
from sft.training.strategy import MegatronStrategy

Answers = Callable[[SFTGPT, ControlGroup, int], dict[str, float]]
"""Answers the prompts at a step and returns the metric function's results."""


def held_out_batches(
    spec: RunSpec, topology: Topology, data: SFTDataModule, tokenizer_dir: Path, *, build: bool
) -> dict[str, StepBatches]:
    """Return the data sets to evaluate by the suffix of their metrics: "" for data.validation, `/name` for a set."""
    found = {"": data.validation_batches()}
    for name, prepared in open_validation_sets(spec, tokenizer_dir, build=build):
        found[f"/{name}"] = SFTDataModule(spec, topology, prepared).validation_batches()
    return {suffix: batches for suffix, batches in found.items() if batches is not None}


def missing_metrics(spec: RunSpec, metrics: Mapping[str, float]) -> list[str]:
    """Return a problem for each metric that this run compares and that an evaluation did not give.

    The launcher does not know what evaluation.metric returns. Its misspelled name would stop a run as one that does not
    improve, and keep no checkpoint as the best.
    """
    early, checkpoint = spec.train.early_stopping, spec.checkpoint
    compared = {
        "train.early_stopping.metric": early.metric if early.patience is not None else None,
        "checkpoint.best_metric": checkpoint.best_metric if checkpoint.keep_best else None,
    }
    given = ", ".join(sorted(metrics)) or "none"
    return [
        f"{key}: {name!r} is not what evaluations of this run give: {given}"
        for key, name in compared.items()
        if name is not None and name not in metrics
    ]


class EvaluationCallback(pl.Callback):
    """Evaluates before the first step, every `eval_every` steps, and after the last."""

    def __init__(
        self, spec: RunSpec, held_out: Mapping[str, StepBatches], answers: Answers | None, log: RunLog
    ) -> None:
        self._spec = spec
        self._every = spec.train.eval_every
        self._held_out = held_out
        self._answers = answers
        self._log = log
        self.early_stopping = EarlyStopping(spec)
        self._latest: tuple[int, dict[str, float]] = (-1, {})

    @property
    def state_key(self) -> str:
        return EarlyStoppingState.KEY

    def state_dict(self) -> dict[str, object]:
        return self.early_stopping.state.to_json()

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.early_stopping.restore(EarlyStoppingState.from_json(state_dict))

    def metrics_at(self, step: int) -> dict[str, float]:
        """Return the metrics of the evaluation after `step` steps, empty if there was none."""
        return self._latest[1] if self._latest[0] == step else {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == 0:
            self._evaluate(trainer, cast(SFTGPT, pl_module), 0)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        step = trainer.global_step
        if step == self._log.max_steps or (self._every and step % self._every == 0):
            self._evaluate(trainer, cast(SFTGPT, pl_module), step)

    def _evaluate(self, trainer: pl.Trainer, module: SFTGPT, step: int) -> None:
        metrics: dict[str, float] = {}
        for suffix, batches in self._held_out.items():
            result = module.evaluate(batches[index] for index in range(len(batches)))
            metrics |= {f"eval_loss{suffix}": result.loss, f"perplexity{suffix}": result.perplexity}
            self._log.say(
                f"step {step}: held-out loss{suffix and ' of ' + suffix[1:]} {result.loss:.4f}, "
                f"perplexity {result.perplexity:.2f} ({result.examples} examples, {result.supervised_tokens} targets)"
            )
        if self._answers is not None:
            metrics |= self._answers(module, cast(MegatronStrategy, trainer.strategy).control, step)
        self._latest = (step, metrics)
        missing = missing_metrics(self._spec, metrics)
        if missing and step == 0:  # later, what has been trained is worth more than an early end
            raise ConfigError(missing)
        for problem in missing:
            self._log.say(f"step {step}: {problem}")
        if metrics:
            self._log.metrics(step=step, **metrics)
        self.early_stopping.update(step, metrics)
        if self.early_stopping.is_due and step < self._log.max_steps:
            metric = self._spec.train.early_stopping.metric
            best, waited = self.early_stopping.state.best_step, self.early_stopping.state.waited
            self._log.say(f"step {step}: {metric} has not improved in {waited} evaluations; best at step {best}")
            self._log.event("stopped_early", step=step, metric=metric, best_step=best)
