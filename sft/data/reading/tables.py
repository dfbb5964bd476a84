"""Read data files that do not hold one JSON object a line: JSON arrays, CSV, TSV, and what is compressed.

Their rows are written out as lines once, beside the parts that workers write, and removed when the workers have read
them. So there is one way to cut work into ranges, memory stays flat, and a row is the same thing everywhere. Each line
begins with the number that errors name: the line of a text, the row of a table.

Parquet, Arrow and Feather are read by sft/data/reading/arrow.py.

Rejected: loading with `datasets` (a second cache of every row, and one more library on every node).
"""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path

from launcher.contract.errors import DataError
from sft.data.reading.arrow import ARROW_FILES, read_arrow
from sft.data.reading.compressed import compression_of, kind_of, opened
from sft.data.reading.row import BINARY, DECODER, TOO_DEEP, Row, check_depth, kind, load

_SEPARATED = {".csv": ",", ".tsv": "\t"}
_BOM = b"\xef\xbb\xbf"

DATA_FILES = (".jsonl", ".json", *_SEPARATED, *ARROW_FILES)
"""Endings of the files that are read from a directory."""


def holds_lines(path: Path) -> bool:
    """Return whether the file holds one JSON object a line, as it is on disk."""
    if kind_of(path) in (*_SEPARATED, *ARROW_FILES) or compression_of(path) is not None:
        return False
    return kind_of(path) != ".json" or not _is_array(path)  # used for both


def place(path: Path, number: int) -> str:
    """Return how errors name a row: file and line, or file and row where there are no lines."""
    return f"{path} row {number}" if kind_of(path) in ARROW_FILES else f"{path}:{number}"


def write_lines(path: Path, target: Path) -> None:
    """Write the rows of `path` to `target` as lines of number, tab and JSON object."""
    with target.open("w", encoding="ascii") as file:
        for number, row in read_rows(path):
            file.write(f"{number}\t{as_json(row)}\n")


def as_json(row: Row) -> str:
    """Return a row as JSON in one line."""
    return json.dumps(row, default=_plain)


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield the rows of a file with their numbers, or raise DataError if it is damaged."""
    ending = kind_of(path)
    if ending in ARROW_FILES:
        return read_arrow(path)
    if ending in _SEPARATED:
        return _separated(path, _SEPARATED[ending])
    return _json_array(path) if ending == ".json" and _is_array(path) else _lines(path)


def dataset_files(directory: Path, key: str) -> list[Path]:
    """Return the Arrow files of a directory that `datasets` saved, or raise DataError beginning with `key`."""
    try:
        if (directory / "dataset_dict.json").is_file():
            splits = json.loads((directory / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
            choice = ", ".join(str(directory / split) for split in splits)
            raise DataError(f"{key}: {str(directory)!r} holds several data sets; name one of {choice}")
        state = json.loads((directory / "state.json").read_text(encoding="utf-8"))
        return [directory / entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{key}: {directory} cannot be read as a saved data set: {error}") from error


def _is_array(path: Path) -> bool:
    """Return whether the first thing in the file is a bracket, perhaps after a byte order mark."""
    with opened(path) as file:
        return file.read(256).removeprefix(_BOM).lstrip()[:1] == b"["


def _lines(path: Path) -> Iterator[tuple[int, Row]]:
    with opened(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, load(line, f"{path}:{number}")


def _json_array(path: Path) -> Iterator[tuple[int, Row]]:
    # Decoded object by object: `json.loads` of the whole would give no line numbers.
    text = _utf8(path)
    position, line, counted = text.index("[") + 1, 1, 0
    closed = False
    while not closed:
        position = _spaces(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text.startswith("]", position):
            break
        row, begin = None, position
        try:
            row, position = DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{error.lineno}: malformed JSON at column {error.colno}: {error.msg}") from None
        except RecursionError:
            raise DataError(f"{path}:{line}: {TOO_DEEP}") from None
        except ValueError as error:  # a key with two values, or a number of more digits than Python converts
            raise DataError(f"{path}:{line}: malformed JSON: {error}") from None
        if not isinstance(row, dict):
            raise DataError(f"{path}:{line}: {kind(row)}, where a JSON object is needed")
        check_depth(row, text.count("[", begin, position) + text.count("{", begin, position), f"{path}:{line}")
        yield line, row
        position = _spaces(text, position)
        closed = text.startswith("]", position)
        if not closed and not text.startswith(",", position):
            raise DataError(f"{path}:{_line_at(text, position)}: malformed JSON: ',' or ']' is missing after an object")
        position += 0 if closed else 1
    rest = _spaces(text, position + 1)
    if rest < len(text):
        raise DataError(f"{path}:{_line_at(text, rest)}: malformed JSON: something follows the end of the array")


def _line_at(text: str, position: int) -> int:
    return 1 + text.count("\n", 0, position)


def _spaces(text: str, position: int) -> int:
    """Return the first position from `position` on that is not white space."""
    while text[position : position + 1].isspace():
        position += 1
    return position


def _separated(path: Path, delimiter: str) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long document
    with opened(path) as file:
        # Bytes that are no UTF-8 are escaped, and found with their line afterwards: a decoder knows no lines.
        text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        reader = csv.reader(_checked(text, path), delimiter=delimiter, strict=True)
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


def _checked(lines: Iterable[str], path: Path) -> Iterator[str]:
    """Yield the lines, or raise DataError with the first that is not UTF-8."""
    for number, line in enumerate(lines, start=1):
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = len(line[: error.start].encode()) + 1
            raise DataError(f"{path}:{number}: not UTF-8 (byte {byte} of the line)") from None
        yield line


def _header(fields: list[str], where: str) -> list[str]:
    doubled = sorted({name for name in fields if fields.count(name) > 1})
    if doubled:
        raise DataError(f"{where}: the header names {', '.join(map(repr, doubled))} more than once")
    return fields


def _plain(value: object) -> object:
    """Return a value that JSON has no type for as text, or as an object for bytes (images, audio)."""
    # No error: columns that are not read may hold anything. And not None, with which an image, or a system prompt that
    # was written as binary data, would be taken for absent.
    if isinstance(value, bytes):
        return {BINARY: len(value)} if value else None
    known = (datetime.date, datetime.time, datetime.timedelta, decimal.Decimal, uuid.UUID)
    return str(value) if isinstance(value, known) else None


def _utf8(path: Path) -> str:
    with opened(path) as file:
        content = file.read()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        start = error.start + (len(_BOM) if content.startswith(_BOM) else 0)
        before = content[:start]
        line, byte = before.count(b"\n") + 1, start - before.rfind(b"\n")
        raise DataError(f"{path}:{line}: not UTF-8 (byte {byte} of the line)") from None
