"""The data of the sets in data.validation_sets: read, tokenized and cached like data.validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.spec import RunSpec
from sft.data.prepared.prepare import PreparedData, open_or_build


def open_validation_sets(spec: RunSpec, tokenizer_dir: Path, *, build: bool) -> Iterator[tuple[str, PreparedData]]:
    """Yield name and data of each set in data.validation_sets, opened in place of data.validation."""
    for name, pattern in spec.data.validation_sets.items():
        data = replace(spec.data, validation=[pattern])
        try:
            yield name, open_or_build(replace(spec, data=data), tokenizer_dir, build=build)
        except DataError as error:
            raise DataError([f"data.validation_sets.{name}: {problem}" for problem in error.problems]) from error
