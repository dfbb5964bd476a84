"""Refuse before submission what `prepare` would refuse at the beginning of the job, as far as heads of files tell it.

This is the one place where the launcher uses modules of `sft`: those that read models' configs and data files, which
need neither torch nor transformers. So both refuse the same, in the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError, ModelError
from launcher.contract.hub.found import Fetch, fetch_now
from launcher.contract.model_shape import read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint
from launcher.contract.spec import RunSpec, TopologySpec


def check_early(spec: RunSpec) -> None:
    """Raise ConfigError with everything that the model's config.json and the first rows of the data already tell."""
    from sft.data.reading.head import head_problems, prompt_problems

    problems = [*_model_problems(spec), *head_problems(spec.data, _vocab_size(spec))]
    problems += prompt_problems(spec.evaluation.prompts, spec.data)
    if problems:
        raise ConfigError(problems)


def check_model(spec: RunSpec) -> None:
    """Raise ConfigError with everything that the model's config.json tells, whatever the topology will be."""
    problems = _model_problems(dataclasses.replace(spec, topology=TopologySpec()))
    if problems:
        raise ConfigError(problems)


def _vocab_size(spec: RunSpec) -> int | None:
    directory = Path(spec.model.path)
    has_config = (directory / "config.json").is_file() and not is_checkpoint(directory)
    return read_model_shape(directory).vocab_size if has_config else None


def longest_row(model: Path) -> int | None:
    """Return the tokens that a row may have for this model, or None where only its positions bound them.

    Raise ModelError for a model that is not covered.
    """
    from sft.hf.checks import longest_row as of_architecture
    from sft.models.registry import read_architecture

    if not (model / "config.json").is_file() or is_checkpoint(model):
        return None
    try:
        return of_architecture(read_architecture(model))
    except ImportError:  # torch, as below: the checks of the finished config say what remains
        return None


def fetch_and_check(spec: RunSpec, fetches: Sequence[Fetch]) -> None:
    """Fetch what is still on the hub, and check the first rows of what has come. HubError or ConfigError."""
    fetch_now(fetches)
    if fetches:
        check_early(spec)


def _model_problems(spec: RunSpec) -> tuple[str, ...]:
    from sft.hf.checks import check_model_settings
    from sft.models.registry import read_architecture

    directory = Path(spec.model.path)
    if not (directory / "config.json").is_file() or is_checkpoint(directory):
        return ()  # it comes later, or is converted first
    try:
        check_model_settings(spec, read_architecture(directory))
    except ModelError as error:
        return error.problems
    except ImportError:  # torch, which compares tensors of some multimodal checkpoints: left to prepare
        return ()
    return ()
