"""Checks of evaluation, and of what waits for its results: early stopping and the best checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from launcher.contract.spec import CheckpointSpec, EarlyStoppingSpec, EvaluationSpec, RunSpec
from launcher.contract.spec.fields import Problem, field_problems
from launcher.contract.spec.rules import shown


def evaluation_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield evaluations of nothing, and metrics that no evaluation gives."""
    evaluation, train = spec.evaluation, spec.train
    if train.eval_every is not None and not is_evaluated(spec):
        yield (
            "train.eval_every",
            f"{train.eval_every} needs data.validation, data.validation_split, data.validation_sets or "
            "evaluation.prompts, and all are empty",
        )
    if train.precision == "fp8" and train.fp8.evaluation and not is_evaluated(spec):
        yield "train.fp8.evaluation", "true, and nothing is evaluated; drop it"
    yield from _answer_problems(evaluation)
    if "" in evaluation.stop_sequences:
        yield "evaluation.stop_sequences", "an empty text is in every answer; take it out"
    early, checkpoint = train.early_stopping, spec.checkpoint
    if early.patience is not None:
        yield from _comparison_problems(
            spec, ("train.early_stopping.metric", early.metric), "train.early_stopping.patience", early.patience
        )
    else:
        yield from _needless("train.early_stopping", early, "train.early_stopping.patience, which is unset")
    if checkpoint.keep_best:
        yield from _comparison_problems(
            spec, ("checkpoint.best_metric", checkpoint.best_metric), "checkpoint.keep_best", checkpoint.keep_best
        )
    else:
        yield from _needless("checkpoint", checkpoint, "checkpoint.keep_best above 0", ("best_metric", "best_mode"))


def _answer_problems(evaluation: EvaluationSpec) -> Iterator[Problem]:
    """Yield settings of answers that nobody asks for, and of sampling where nothing is sampled."""
    if not evaluation.prompts:
        yield from _needless("evaluation", evaluation, "evaluation.prompts, which is unset")
    elif evaluation.temperature == 0:
        yield from _needless(
            "evaluation", evaluation, "evaluation.temperature above 0: nothing is sampled", ("top_k", "top_p", "seed")
        )


def _needless(
    section: str,
    given: EvaluationSpec | EarlyStoppingSpec | CheckpointSpec,
    needed: str,
    names: Sequence[str] | None = None,
) -> Iterator[Problem]:
    """Yield those settings of a section (of `names`, if given) that somebody has set and that only `needed` uses."""
    for item in dataclasses.fields(given):
        value, unset = getattr(given, item.name), getattr(type(given)(), item.name)
        if value == unset or not (names is None or item.name in names) or any(field_problems(given, item.name)):
            continue
        yield f"{section}.{item.name}", f"{value if isinstance(value, str) else shown(value)} needs {needed}"


def _comparison_problems(spec: RunSpec, metric: tuple[str, str], key: str, value: int) -> Iterator[Problem]:
    """Yield why the setting `key` has nothing to compare: its metric (key, name) is not known, or is measured once."""
    unknown = list(_unknown_metric(spec, *metric))
    yield from unknown
    if spec.train.eval_every is None and not unknown:
        yield (
            key,
            f"{value} needs train.eval_every: without it evaluations are before the first and after the last "
            "step alone",
        )


def _unknown_metric(spec: RunSpec, key: str, metric: str) -> Iterator[Problem]:
    # What evaluation.metric returns is not known beforehand.
    if spec.evaluation.metric and metric.startswith("metric/"):
        return
    known = _held_out_metrics(spec)
    if metric not in known:
        given = ", ".join(sorted(known) + (["metric/<name>"] if spec.evaluation.metric else [])) or "none"
        yield key, f"{metric!r} is not what evaluations of this run give: {given}"


def is_evaluated(spec: RunSpec) -> bool:
    """Return whether a run has anything to evaluate."""
    return bool(_held_out_metrics(spec) or spec.evaluation.prompts)


def _held_out_metrics(spec: RunSpec) -> set[str]:
    """Return the names that evaluations give to the results of held-out data."""
    sets = [f"/{name}" for name in spec.data.validation_sets]
    if spec.data.validation or spec.data.validation_split:
        sets.append("")
    return {f"{kind}{name}" for kind in ("eval_loss", "perplexity") for name in sets}
