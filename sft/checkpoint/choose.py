"""Choose the checkpoint of a run that is exported.

Where evaluations ranked the checkpoints (checkpoint.keep_best, or early stopping), it is the best: a run that stops
because the model gets worse should not export the worse one. Otherwise it is the newest. The bytes are compared with
the checksums first; damaged checkpoints are skipped for the next best, then for older ones.

Megatron-core is not imported.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import CheckpointError, RunStateError
from launcher.contract.rundir import RunPaths, checkpoint_step
from launcher.contract.spec import RunSpec
from sft.checkpoint.contents import BestSteps, Comparison, TrainerState
from sft.checkpoint.files import changed_bytes, damage

_READERS = 8
"""Number of threads that compute checksums; a single one does not keep a parallel file system busy."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A checkpoint to export."""

    path: Path
    why: str
    """The reason, for people."""

    @property
    def step(self) -> int:
        return checkpoint_step(self.path)


def choose(paths: RunPaths, spec: RunSpec, step: int | None = None) -> Choice:
    """Return the first undamaged checkpoint in order of preference, and warn about each that is skipped.

    RunStateError where the run has none (of step `step`), CheckpointError where all are damaged.
    """
    complete = paths.complete_checkpoints()
    choices = list(_as_asked(complete, step) if step is not None else _by_rank(complete, spec))
    if not choices:
        there = ", ".join(str(checkpoint_step(path)) for path in complete)
        what = "complete checkpoint to export" if step is None else f"complete checkpoint of step {step}"
        do = f"there are those of steps {there}" if there else "let the run reach its first one"
        raise RunStateError(f"{paths.root}: no {what}; {do}")
    for choice in choices:
        problem = damage(choice.path) or _changed(choice.path)
        if problem is None:
            return choice
        warnings.warn(f"checkpoint {choice.path} is damaged and skipped: {problem}", stacklevel=2)
    raise CheckpointError(f"{paths.root}: every checkpoint to export is damaged; of the last one tried, {problem}")


def _as_asked(complete: list[Path], step: int) -> Iterator[Choice]:
    yield from (Choice(path, "the step asked for") for path in complete if checkpoint_step(path) == step)


def _by_rank(complete: list[Path], spec: RunSpec) -> Iterator[Choice]:
    """Yield the best checkpoints, best first, then all others from the newest to the oldest."""
    by_step = {checkpoint_step(path): path for path in complete}
    ranking = spec.checkpoint_ranking
    metric = ranking.best_metric
    known = _ranked(complete)
    # The run may have been given another metric since, by which nothing was ranked yet.
    counts = ranking.export_step == "best" and known.compared.agrees(Comparison(metric, ranking.best_mode))
    ranked = known.best if counts else ()
    for best in ranked:
        if best.step in by_step:
            yield Choice(by_step.pop(best.step), f"the best {metric}, {best.value:.4f}")
    for step in reversed(by_step):
        yield Choice(by_step[step], "the newest" if not ranked else "the newest of those that are not among the best")


def _ranked(complete: list[Path]) -> BestSteps:
    """Return the best evaluations as the newest checkpoint that can be read knows them."""
    for path in reversed(complete):
        if damage(path) is not None:
            continue
        with contextlib.suppress(CheckpointError, ValueError):  # the checksums tell, if this one is to be exported
            return TrainerState.read(path).best
    return BestSteps("", ())


def _changed(path: Path) -> str | None:
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda share: changed_bytes(path, share=share, shares=_READERS), range(_READERS))
        return next((problem for problem in found if problem is not None), None)
