"""Refuse before submission what `prepare` would refuse at the beginning of the job, as far as heads of files tell it.

This is the one place where the launcher uses modules of `sft`: those that read models' configs, data files and what
checkpoints record, which need neither torch nor transformers. So both refuse the same, in the same words.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import CheckpointError, ConfigError, ModelError
from launcher.contract.hub.found import Fetch, fetch_now
from launcher.contract.model_shape import read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint
from launcher.contract.rundir import RunPaths, complete_checkpoints
from launcher.contract.spec import RunSpec, TopologySpec

if TYPE_CHECKING:
    from sft.checkpoint.contents import TrainerState
    from sft.models.architecture import Architecture


def check_early(spec: RunSpec, fetches: Sequence[Fetch] = ()) -> None:
    """Raise ConfigError with everything that the model's config.json and the first rows of the data already tell.

    While something is still to be fetched, neither the tokenizer nor what a run resumes with is looked at: `submit`
    does so again once everything is there.
    """
    from sft.data.reading.head import head_problems, prompt_problems

    template = None if fetches else _template_problem(spec)
    problems = [*_model_problems(spec), *head_problems(spec.data, _vocab_size(spec), template)]
    problems += prompt_problems(spec.evaluation.prompts, spec.data)
    if template is not None and spec.evaluation.prompts is not None and template not in problems:
        problems.append(template)
    if problems:
        raise ConfigError(problems)
    if spec.checkpoint.resume_from is not None and not fetches:
        _check_resume(spec, Path(spec.checkpoint.resume_from))


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


def _check_resume(spec: RunSpec, given: Path) -> None:
    """Raise ConfigError where the ranks would refuse to go on from checkpoint.resume_from, as far as that is known."""
    from sft.checkpoint.same_run import run_problems

    source = _newest(given) or given
    trainer = _trainer_state(source)
    if trainer is None:
        return
    key = _expected_data_key(spec, trainer.data_key, same_settings=False)
    problems = run_problems(source, trainer, spec, _architecture(Path(spec.model.path)), key)
    if problems:
        raise ConfigError(problems)


def _architecture(model: Path) -> Architecture | None:
    """Return a model's architecture, or None where it cannot be read here. Raise ModelError where it is not covered."""
    from sft.models.registry import read_architecture

    with contextlib.suppress(ImportError):  # torch, which compares tensors of some multimodal checkpoints
        return read_architecture(model) if _is_readable(model) else None
    return None


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

    return expected_data_key(spec, before, _tokenizer_directory(spec), same_settings=same_settings)


def _tokenizer_directory(spec: RunSpec) -> Path | None:
    """Return the tokenizer's directory, or None where it is not there yet."""
    directory = Path(spec.model.tokenizer or spec.model.path)
    is_there = directory.is_dir() if spec.model.tokenizer else _is_readable(directory)
    return directory if is_there else None


def _template_problem(spec: RunSpec) -> str | None:
    from sft.data.encoding.stored_template import template_problem

    directory = _tokenizer_directory(spec)
    return None if directory is None else template_problem(directory, spec.data)


def check_model(spec: RunSpec) -> None:
    """Raise ConfigError with everything that the model's config.json tells, whatever the topology will be."""
    problems = _model_problems(dataclasses.replace(spec, topology=TopologySpec()))
    if problems:
        raise ConfigError(problems)


def _vocab_size(spec: RunSpec) -> int | None:
    directory = Path(spec.model.path)
    return read_model_shape(directory).vocab_size if _is_readable(directory) else None


def _is_readable(model: Path) -> bool:
    """Return whether a model can be read here. Otherwise it comes later, or is converted first."""
    return (model / "config.json").is_file() and not is_checkpoint(model)


def longest_row(model: Path) -> int | None:
    """Return the tokens that a row may have for this model, or None where only its positions bound them.

    Raise ModelError for a model that is not covered.
    """
    from sft.hf.checks import longest_row as of_architecture

    architecture = _architecture(model)  # without one, the checks of the finished config say what remains
    return None if architecture is None else of_architecture(architecture)


def fetch_and_check(spec: RunSpec, fetches: Sequence[Fetch]) -> None:
    """Fetch what is still on the hub, and check the first rows of what has come. HubError or ConfigError."""
    fetch_now(fetches)
    if fetches:
        check_early(spec)


def _model_problems(spec: RunSpec) -> tuple[str, ...]:
    from sft.hf.checks import check_model_settings

    try:
        architecture = _architecture(Path(spec.model.path))
        if architecture is not None:
            check_model_settings(spec, architecture)
    except ModelError as error:
        return error.problems
    return ()
