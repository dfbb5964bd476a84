"""Read the first rows of data files, for what `prepare` would refuse at the beginning of a job to be refused before it.

Without torch, numpy and transformers: the launcher calls this on a login node. What cannot be read there (a table
without pyarrow, a file that is not fetched yet, a large one that has to be read as a whole) is left to `prepare`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.named_templates import NONE
from launcher.contract.spec import DataSpec
from sft.data.reading.arrow import ARROW_FILES
from sft.data.reading.compressed import compression_of, kind_of
from sft.data.reading.files import expand
from sft.data.reading.formats import (
    Example,
    check_columns,
    check_columns_read,
    parse_row,
    rows_of,
    with_detected_form,
)
from sft.data.reading.policies import NEEDS_TEMPLATE, policy_problems
from sft.data.reading.prompt_rows import read_prompt_rows
from sft.data.reading.tables import as_json, holds_lines

_FILES = 16
_ROWS = 20
_WHOLE = 16 << 20
"""Bytes of the largest file that is read as a whole for its first rows."""


def head_problems(data: DataSpec, vocab_size: int | None = None, template_problem: str | None = None) -> list[str]:
    """Return what is wrong with the first rows of the first files of each data set, one problem a file.

    `vocab_size` is the model's, where it is known: ids in rows must be below it. `template_problem` is why no
    conversation could be written, if so.
    """
    problems: dict[str, None] = {}
    columns = {f"data.sources.{name}.columns": source.columns for name, source in data.sources.items()}
    for key, names in {"data.columns": data.columns, **columns}.items():
        try:
            check_columns(names, key)
        except DataError as error:
            problems |= dict.fromkeys(error.problems)
    formats: dict[str, str] = {}
    sets = list(_data_sets(data))
    for key, part in sets:
        problems |= dict.fromkeys(_set_problems(part, key, vocab_size, template_problem, formats))
    if not problems and len(formats) == len(sets):
        problems |= dict.fromkeys((*policy_problems(data, formats), *_column_problems(data, formats)))
    return list(problems)


def prompt_problems(prompts: str | None, data: DataSpec) -> list[str]:
    """Return what is wrong with the first rows of evaluation.prompts, one problem at most."""
    if prompts is None or not Path(prompts).is_file():
        return []
    try:
        for _ in itertools.islice(read_prompt_rows(Path(prompts), data), _ROWS):
            pass
    except DataError as error:
        return [error.problems[0]]
    return []


def _column_problems(data: DataSpec, formats: dict[str, str]) -> Iterator[str]:
    """Yield columns that no rows of the data sets which have them are read with."""
    own = {f"data.sources.{name}": source.columns for name, source in data.sources.items() if source.columns}
    inherits = {row_format for key, row_format in formats.items() if key not in own}
    named = [(f"{key}.columns", columns, {formats[key]}) for key, columns in own.items()]
    for key, columns, read in (*named, ("data.columns", data.columns, inherits)):
        try:
            check_columns_read(columns, read, key)
        except DataError as error:
            yield from error.problems


def _data_sets(data: DataSpec) -> Iterator[tuple[str, DataSpec]]:
    """Yield key and settings of each data set, its files as `train`."""
    for name in data.sources:
        yield f"data.sources.{name}", data.of_source(name)
    if data.train:
        yield "data.train", data
    alone = dataclasses.replace(data, sources={})
    if data.validation:
        yield "data.validation", dataclasses.replace(alone, train=data.validation)
    for name, pattern in data.validation_sets.items():
        yield f"data.validation_sets.{name}", dataclasses.replace(alone, train=[pattern])


def _set_problems(
    data: DataSpec, key: str, vocab_size: int | None, template_problem: str | None, formats: dict[str, str]
) -> Iterator[str]:
    """Yield the problems of one data set, and put the format of its rows into `formats` where it can be known here."""
    if not all(Path(pattern).exists() for pattern in data.train):
        return  # a glob of held-out files, or what is still on the hub
    try:
        files = [path for path in expand(data.train, key)[:_FILES] if _is_readable(path)]
        data = with_detected_form(files, data, key) if files else data
        if data.format != "auto":
            formats[key] = data.format
    except DataError as error:
        yield from error.problems
        return
    for path in files:
        try:
            for where, row in itertools.islice(rows_of(path), _ROWS):
                example = parse_row(as_json(row).encode(), where, data.format, data.columns, data.ignore_keys)
                _check_ids(example, vocab_size)
                if example.messages and data.chat_template == NONE:
                    raise DataError(NEEDS_TEMPLATE)
                if template_problem is not None and (example.messages or example.completion is not None):
                    raise DataError(template_problem)
        except DataError as error:
            yield error.problems[0]


def _check_ids(example: Example, vocab_size: int | None) -> None:
    largest = max(example.ids or (0,))
    if vocab_size is not None and largest >= vocab_size:
        raise DataError(
            f"{example.where}: token id {largest} is not in the model's vocabulary of {vocab_size} (vocab_size in its "
            "config.json); make the ids with its tokenizer"
        )


def _is_readable(path: Path) -> bool:
    """Return whether the first rows can be had here, and at once."""
    kind, compression = kind_of(path), compression_of(path)
    if (kind in ARROW_FILES or compression == "zstd") and importlib.util.find_spec("pyarrow") is None:
        return False
    in_order = kind in (*ARROW_FILES, ".jsonl") or holds_lines(path)
    return in_order or path.stat().st_size <= (_WHOLE if compression is None else _WHOLE // 8)
