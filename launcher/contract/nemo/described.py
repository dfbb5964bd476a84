"""Compare the model that a NeMo config describes with the one in model.path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from launcher.contract.errors import ConfigError
from launcher.contract.model_shape import ModelShape


def check_described(
    described: Mapping[str, object], shape: ModelShape, shown: str, model_path: str, ignored: Sequence[str] = ()
) -> None:
    """Raise ConfigError if the model that the file `shown` describes is not the one in model_path.

    `described` is its config.json; `ignored` are fields of ModelShape that may differ.
    """
    expected = ModelShape.from_config(dict(described), shown)
    ignored = ("max_position_embeddings", *ignored)  # rotary positions need no table of that length
    differences = [
        f"{shown}: model: {field.name} is {mine}, but {theirs} in model.path {model_path}"
        for field in dataclasses.fields(ModelShape)
        if field.name not in ignored
        and (mine := getattr(expected, field.name)) != (theirs := getattr(shape, field.name))
    ]
    if differences:
        raise ConfigError(differences)
