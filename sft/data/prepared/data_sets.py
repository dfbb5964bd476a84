"""The data sets that a config names: which files are read together, how, and which key errors name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec

if TYPE_CHECKING:  # it needs numpy, which a login node may not have
    from sft.data.reading.split import Side


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Files that are read in the same way and make one cache."""

    name: str
    key: str
    """The config key that errors name."""
    data: DataSpec
    """How it is read. Its files are in `train`, whichever key of the config names them."""
    own_columns: Mapping[str, str] = field(default_factory=dict)
    """Columns that were named for these very files, so that each must be in them."""
    side: Side | None = None
    """The part of the rows that it has, where data.validation_split splits them."""


def training_sets(data: DataSpec) -> list[DataSet]:
    """Return the sources, or data.train as the only one, or raise DataError if there is neither."""
    if data.sources:
        return [
            DataSet(name=name, key=f"data.sources.{name}", data=data.of_source(name), own_columns=source.columns)
            for name, source in data.sources.items()
        ]
    if not data.train:
        raise DataError("data.train: no files")
    side: Side | None = "train" if data.validation_split else None
    return [DataSet(name="train", key="data.train", data=data, own_columns=data.columns, side=side)]


def held_out_sets(data: DataSpec) -> list[DataSet]:
    """Return data.validation or the part that data.validation_split holds out as a data set, or nothing."""
    if data.validation:
        held_out = dataclasses.replace(data, train=data.validation, sources={})
        return [DataSet(name="validation", key="data.validation", data=held_out)]
    if data.validation_split:
        return [DataSet(name="validation", key="data.validation_split", data=data, side="held_out")]
    return []
