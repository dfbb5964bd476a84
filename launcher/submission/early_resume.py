"""Refuse before submission what a run's ranks would refuse to go on from, by what its checkpoint records."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import CheckpointError, ConfigError
from launcher.contract.rundir import RunPaths, complete_checkpoints
from launcher.contract.spec import RunSpec
from launcher.submission.early_model import architecture_of, tokenizer_directory

if TYPE_CHECKING:
    from sft.checkpoint.contents import TrainerState


def check_goes_on(spec: RunSpec, paths: RunPaths) -> None:
    """Raise ConfigError where files have changed under a run, so that its ranks would refuse what they go on from."""
    from sft.checkpoint.same_run import data_problems

    given = spec.checkpoint.resume_from
    source = _newest(paths.checkpoints) or (None if given is None else _newest(Path(given)) or Path(given))
    trainer = None if source is None else _trainer_state(source)
    if source is None or trainer is None:
        return
    problems = data_problems(source, trainer, _expected_data_key(spec, trainer.data_key, same_settings=True))
    if problems:
        raise ConfigError(problems)


def check_resume_from(spec: RunSpec, given: Path) -> None:
    """Raise ConfigError where the ranks would refuse to go on from checkpoint.resume_from, as far as that is known."""
    from sft.checkpoint.same_run import run_problems

    source = _newest(given) or given
    trainer = _trainer_state(source)
    if trainer is None:
        return
    key = _expected_data_key(spec, trainer.data_key, same_settings=False)
    problems = run_problems(source, trainer, spec, architecture_of(Path(spec.model.path)), key)
    if problems:
        raise ConfigError(problems)


def _newest(folder: Path) -> Path | None:
    return next(reversed(complete_checkpoints(folder)), None)


def _trainer_state(source: Path) -> TrainerState | None:
    """Return what a checkpoint records, or None where it is not there yet, or damaged: the ranks take an older one."""
    from sft.checkpoint.contents import TrainerState

    with contextlib.suppress(CheckpointError):
        return TrainerState.read(source)
    return None


def _expected_data_key(spec: RunSpec, before: Mapping[str, object], *, same_settings: bool) -> Mapping[str, object]:
    from sft.data.prepared.data_key import expected_data_key

    return expected_data_key(spec, before, tokenizer_directory(spec), same_settings=same_settings)
