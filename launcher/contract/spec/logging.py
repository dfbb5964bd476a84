"""logging: what is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from launcher.contract.spec.rules import TRACKING_PLACE, WANDB_PROJECT, AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggingSpec:
    """What is written down."""

    every: Annotated[int, AtLeast(1)] = 1
    """Steps between log lines."""
    progress_bar: bool = True
    """Show a progress bar on rank 0."""
    plot: bool = True
    """Draw loss.png at the end."""
    tensorboard: bool = False
    """Curves for TensorBoard in RUN/tensorboard."""
    wandb: Annotated[str | None, WANDB_PROJECT] = None
    """Log to this Weights & Biases project: kept in RUN/wandb for `wandb sync`, or sent with WANDB_MODE=online in
    cluster.env and WANDB_API_KEY in env_from."""
    mlflow: Annotated[str | None, TRACKING_PLACE] = None
    """Log to MLflow: a tracking URI, or `local` for RUN/mlflow.db."""
    nemo: bool = False
    """Write the numbers of each log line with NeMo's logger, too (package nemo_toolkit 3), where its exp_manager
    does."""
    prompts: list[str] = field(default_factory=list)
    """Questions that are answered greedily before and after training, and printed side by side (needs
    checkpoint.export)."""

    def is_due(self, step: int, last: int) -> bool:
        """Return whether the step gets a log line, where `last` is the last one of the run."""
        return step % self.every == 0 or step == last
