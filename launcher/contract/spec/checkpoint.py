"""checkpoint: what is kept, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from launcher.contract.spec.paths import CompleteCheckpoint
from launcher.contract.spec.rules import AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointSpec:
    """What is kept, and how often."""

    every: Annotated[int | None, AtLeast(1)] = None
    """Steps between checkpoints; the last step always has one."""
    copy_every: Annotated[int | None, AtLeast(1)] = None
    """Steps between copies of the run's state in the memory of its nodes (/dev/shm), each with a second copy on another
    node, from which a restart in place loses fewer steps. Needs restart.how in_place."""
    keep_last: Annotated[int, AtLeast(1)] = 2
    """Newest complete checkpoints to keep."""
    keep_best: Annotated[int, AtLeast(0)] = 0
    """Checkpoints to keep besides the newest: those with the best best_metric. An evaluation that is among the best so
    far saves one; needs train.eval_every. With early_stopping the best by its metric is kept even at 0."""
    best_metric: str = "eval_loss"
    """What keep_best compares: eval_loss, eval_loss/<set>, or metric/<name> of evaluation.metric."""
    best_mode: Literal["min", "max"] = "min"
    """Whether lower or higher is better."""
    asynchronous: bool = False
    """Keep training while a checkpoint is written, which takes host memory for a copy of what each rank saves."""
    resume_from: Annotated[str | None, CompleteCheckpoint()] = None
    """A complete checkpoint directory of another run to start from (weights, optimizer, data position), or a run's
    checkpoints folder for the newest in it when the ranks start (with after)."""
    export_step: Literal["best", "newest"] = "best"
    """Which checkpoint is exported. newest; or best: the one with the best best_metric where keep_best is set, else the
    best by the metric of early_stopping, which is kept for that, else the newest."""
    export: bool = True
    """Write a Hugging Face directory to export/ when training is done; for a LoRA run the PEFT adapter."""
    export_merged: bool = False
    """For a LoRA run: export the model with the adapter merged into its weights, and the adapter in export/adapter/."""
