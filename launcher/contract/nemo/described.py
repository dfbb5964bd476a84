"""The model that a NeMo config spells out must be the one in model.path."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from launcher.contract.errors import ConfigError
from launcher.contract.model_shape import ModelShape


def check_described(
    described: Mapping[str, Any], shape: ModelShape, shown: str, model_path: str, ignored: Sequence[str] = ()
) -> None:
    """ConfigError where the model that the file `shown` spells out, as a config.json, is not the one in model_path."""
    spelled_out = ModelShape.from_config(dict(described), shown)
    ignored = ("max_position_embeddings", *ignored)  # rotary positions have no table of that length
    differences = [
        f"{shown}: model: {field.name} is {mine}, but {theirs} in model.path {model_path}"
        for field in dataclasses.fields(ModelShape)
        if field.name not in ignored
        and (mine := getattr(spelled_out, field.name)) != (theirs := getattr(shape, field.name))
    ]
    if differences:
        raise ConfigError(differences)
