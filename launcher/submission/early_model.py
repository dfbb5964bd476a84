"""What a model's config.json tells before submission, read by the modules of `sft` that need no torch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.contract.errors import ConfigError, ModelError
from launcher.contract.model_shape import read_model_shape
from launcher.contract.nemo.checkpoint import is_checkpoint
from launcher.contract.spec import RunSpec, TopologySpec

if TYPE_CHECKING:
    from sft.models.architecture import Architecture


def check_model(spec: RunSpec) -> None:
    """Raise ConfigError with everything that the model's config.json tells, whatever the topology will be."""
    problems = model_problems(dataclasses.replace(spec, topology=TopologySpec()))
    if problems:
        raise ConfigError(problems)


def model_problems(spec: RunSpec) -> tuple[str, ...]:
    """Return why the ranks would refuse this model with these settings."""
    from sft.hf.checks import check_model_settings

    try:
        architecture = architecture_of(Path(spec.model.path))
        if architecture is not None:
            check_model_settings(spec, architecture)
    except ModelError as error:
        return error.problems
    return ()


def longest_row(model: Path) -> int | None:
    """Return the tokens that a row may have for this model, or None where only its positions bound them.

    Raise ModelError for a model that is not covered.
    """
    from sft.hf.checks import longest_row as of_architecture

    architecture = architecture_of(model)  # without one, the checks of the finished config say what remains
    return None if architecture is None else of_architecture(architecture)


def architecture_of(model: Path) -> Architecture | None:
    """Return a model's architecture, or None where it cannot be read here. Raise ModelError where it is not covered."""
    from sft.models.registry import read_architecture

    with contextlib.suppress(ImportError):  # torch, which compares tensors of some multimodal checkpoints
        return read_architecture(model) if _is_readable(model) else None
    return None


def vocab_size(spec: RunSpec) -> int | None:
    """Return the size of the model's vocabulary, or None where the model is not there yet."""
    directory = Path(spec.model.path)
    return read_model_shape(directory).vocab_size if _is_readable(directory) else None


def tokenizer_directory(spec: RunSpec) -> Path | None:
    """Return the tokenizer's directory, or None where it is not there yet."""
    directory = Path(spec.model.tokenizer or spec.model.path)
    is_there = directory.is_dir() if spec.model.tokenizer else _is_readable(directory)
    return directory if is_there else None


def _is_readable(model: Path) -> bool:
    """Return whether a model can be read here. Otherwise it comes later, or is converted first."""
    return (model / "config.json").is_file() and not is_checkpoint(model)
