"""Read data files that do not hold one JSON object a line: JSON arrays, CSV, TSV, Parquet and Arrow.

Their rows are written out as lines once, beside the parts that workers write, and removed when the workers have read
them. So there is one way to cut work into ranges, memory stays flat, and a row is the same thing everywhere. Each line
begins with the number that errors name: the line of a JSON or CSV file, the row of the others.

Parquet and Arrow are read with pyarrow alone; a directory that `datasets` saved holds Arrow files.

Rejected: loading with `datasets` (a second cache of every row, and one more library on every node), and reading
Parquet by row groups in the workers (a row group can have any size).
"""

from __future__ import annotations

import csv
import datetime
import decimal
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

from launcher.contract.errors import DataError
from sft.data.reading.row import Row, kind

_TABLES = (".csv", ".tsv", ".parquet", ".arrow")
_BATCH_ROWS = 1024
_INSTALL = "pip install 'slurm-sft-launcher[data]'"


def holds_lines(path: Path) -> bool:
    """Return whether the file holds one JSON object a line."""
    if path.suffix == ".json":  # used for both: an array begins with a bracket, perhaps after a byte order mark
        with path.open("rb") as file:
            return file.read(256).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"["
    return path.suffix not in _TABLES


def place(path: Path, number: int) -> str:
    """Return how errors name a row: file and line, or file and row where there are no lines."""
    return f"{path} row {number}" if path.suffix in (".parquet", ".arrow") else f"{path}:{number}"


def write_lines(path: Path, target: Path) -> None:
    """Write the rows of `path` to `target` as lines of number, tab and JSON object."""
    with target.open("w", encoding="ascii") as file:
        for number, row in read_rows(path):
            file.write(f"{number}\t{as_json(row)}\n")


def as_json(row: Row) -> str:
    """Return a row as JSON in one line."""
    return json.dumps(row, default=_plain)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file that does not hold lines with their numbers, or raise DataError if it is damaged."""
    if path.suffix == ".json":
        return _json_array(path)
    if path.suffix in (".csv", ".tsv"):
        return _separated(path, "," if path.suffix == ".csv" else "\t")
    return _arrow(path)


def dataset_files(directory: Path, key: str) -> list[Path]:
    """Return the Arrow files of a directory that `datasets` saved, or raise DataError beginning with `key`."""
    try:
        if (directory / "dataset_dict.json").is_file():
            splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            choice = ", ".join(str(directory / split) for split in splits)
            raise DataError(f"{key}: {str(directory)!r} holds several data sets; name one of {choice}")
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        return [directory / entry["filename"] for entry in state["_data_files"]]
    except FileNotFoundError:
        raise DataError(f"{key}: {str(directory)!r} is neither a file nor a data set that `datasets` saved") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{key}: {directory} cannot be read as a saved data set: {error}") from error


def _json_array(path: Path) -> Iterator[tuple[int, Row]]:
    # Decoded object by object: `json.loads` of the whole would give no line numbers.
    text = _utf8(path)
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    closed = False
    while not closed:
        position = _spaces(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path}:{line}: JSON is nested too deeply") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: {kind(row)}, where a JSON object is needed")
        yield line, row
        position = _spaces(text, position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            number = 1 + text.count("\n", 0, position)
            raise DataError(f"{path}:{number}: malformed JSON: ',' or ']' is missing after an object")
        position += 1


def _spaces(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _separated(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        header: list[str] = []
        line = 1
        try:
            for fields in reader:
                if fields and not header:
                    header = _header(fields, f"{path}:{line}")
                elif fields and len(fields) != len(header):
                    raise DataError(f"{path}:{line}: {len(fields)} fields, where the header names {len(header)}")
                elif fields:
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(f"{path}:{line}: {error}") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}:{line}: not UTF-8 ({error.reason})") from None


def _header(fields: list[str], where: str) -> list[str]:
    doubled = sorted({name for name in fields if fields.count(name) > 1})
    if doubled:
        raise DataError(f"{where}: the header names {', '.join(map(repr, doubled))} more than once")
    return fields


def _arrow(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(f"{path}: reading it needs pyarrow: {_INSTALL}") from None
    number = 0
    try:
        with pa.memory_map(str(path)) as source:
            if path.suffix == ".parquet":
                batches = pq.ParquetFile(source).iter_batches(_BATCH_ROWS)
            else:
                batches = iter(pa.ipc.open_stream(source))
            for batch in batches:  # of any size in an Arrow file: taken in parts, to keep few Python objects at a time
                for start in range(0, batch.num_rows, _BATCH_ROWS):
                    for row in batch.slice(start, _BATCH_ROWS).to_pylist():
                        number += 1
                        yield number, {name: _without_nulls(value) for name, value in row.items()}
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: damaged after row {number}: {error}") from error


def _without_nulls(value: object) -> object:
    """Leave out null keys of nested objects: Arrow gives every object every key that any of them has."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _plain(value: object) -> str | None:
    """Return a value that JSON has no type for as text, None for bytes (images, audio)."""
    # None instead of an error: columns that are not read may hold anything, and one that is read must be a text.
    known = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)
    return str(value) if isinstance(value, known) else None


def _utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})") from None
