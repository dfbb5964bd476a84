"""Whether a checkpoint's weights are used in the model that they were trained in.

What they mean depends on files that may be edited or replaced between training and a resume or an export: config.json
says what is computed with them, and adapters belong to the frozen weights that they were trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from launcher.contract.errors import ConfigError
from sft.checkpoint.contents import TrainerState
from sft.models.numerics import differences


def check_model(source: Path, trainer: TrainerState, model: Mapping[str, object]) -> None:
    """Raise ConfigError where a checkpoint's weights belong to a model that computes something else."""
    problems = model_problems(source, trainer, model)
    if problems:
        raise ConfigError(problems)


def model_problems(source: Path, trainer: TrainerState, model: Mapping[str, object]) -> list[str]:
    """Return whether a checkpoint's weights belong to a model that computes something else."""
    if trainer.model is None or trainer.model == model:
        return []
    return [
        f"{source} was written by a run of another model: {'; '.join(differences(trainer.model, model))}. The same "
        "weights would mean something else. Put config.json of model.path back, or start a new run"
    ]


def check_base_weights(source: Path, trainer: TrainerState, found: str) -> None:
    """Raise ConfigError where a checkpoint's adapters belong to other frozen weights than those that are `found`."""
    if trainer.base_weights is not None and trainer.base_weights != found:
        raise ConfigError(
            f"{source} holds adapters that were trained on other weights than those in model.path now; put its weight "
            "files back, or set model.path to where they are"
        )
