"""Checks of evaluation, and of what waits for its results: early stopping and the best checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from launcher.contract.spec import RunSpec
from launcher.contract.spec.fields import Problem


def evaluation_problems(spec: RunSpec) -> Iterator[Problem]:
    """Yield evaluations of nothing, and metrics that no evaluation gives."""
    evaluation, train = spec.evaluation, spec.train
    if train.eval_every is not None and not _held_out_metrics(spec) and not evaluation.prompts:
        yield (
            "train.eval_every",
            f"{train.eval_every} needs data.validation, data.validation_split, data.validation_sets or "
            "evaluation.prompts, and all are empty",
        )
    if evaluation.metric and not evaluation.prompts:
        yield "evaluation.metric", f"{evaluation.metric} needs evaluation.prompts, which is unset"
    if "" in evaluation.stop_sequences:
        yield "evaluation.stop_sequences", "an empty text is in every answer; take it out"
    if train.early_stopping.patience is not None:
        yield from _unknown_metric(spec, "train.early_stopping.metric", train.early_stopping.metric)
    if spec.checkpoint.keep_best:
        yield from _unknown_metric(spec, "checkpoint.best_metric", spec.checkpoint.best_metric)


def _unknown_metric(spec: RunSpec, key: str, metric: str) -> Iterator[Problem]:
    # What evaluation.metric returns is not known beforehand.
    if spec.evaluation.metric and metric.startswith("metric/"):
        return
    known = _held_out_metrics(spec)
    if metric not in known:
        given = ", ".join(sorted(known) + (["metric/<name>"] if spec.evaluation.metric else [])) or "none"
        yield key, f"{metric!r} is not what evaluations of this run give: {given}"


def _held_out_metrics(spec: RunSpec) -> set[str]:
    """Return the names that evaluations give to the results of held-out data."""
    sets = [f"/{name}" for name in spec.data.validation_sets]
    if spec.data.validation or spec.data.validation_split:
        sets.append("")
    return {f"{kind}{name}" for kind in ("eval_loss", "perplexity") for name in sets}
