"""One JSON object of a data file: reading it, and looking keys up with errors that name file, line and key.

A dotted key goes down: `instances.0.input` is the `input` of the first item of `instances`. A key that is there as
it is written wins, for names may hold dots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from launcher.contract.errors import DataError, did_you_mean

MISSING = object()


def load(line: bytes, where: str) -> dict[str, Any]:
    """The object in one line."""
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        # A pretty-printed file: its first line is a lone bracket.
        hint = "; a data file holds one object a line" if line.strip() in (b"[", b"{") else ""
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {kind(row)}, where a JSON object is needed; a data file holds one object a line")
    return row


def find(row: Any, key: str) -> Any:
    """The value of a possibly dotted key, or MISSING."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    head, _, rest = key.partition(".")
    if not rest:
        return row[int(head)] if isinstance(row, list) and head.isdecimal() and int(head) < len(row) else MISSING
    inner = find(row, head)
    return MISSING if inner is MISSING else find(inner, rest)


def get(row: Mapping[str, Any], key: str, where: str) -> Any:
    """The value of a key that must be there."""
    value = find(row, key)
    if value is MISSING:
        raise DataError(f"{where}: no key {key!r}; found {names(row)}{did_you_mean(key, row)}")
    return value


def get_text(row: Mapping[str, Any], key: str, where: str) -> str:
    """The text of a key that must be there."""
    return text(get(row, key, where), f"{where}: {key!r}")


def text(value: Any, where: str) -> str:
    """`value`, which must be a text."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a text, found {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where} holds half a surrogate pair ({found}), which is no text") from None
    return value


def check_texts(value: Any, where: str) -> None:
    """Refuse half surrogate pairs anywhere in a JSON value."""
    if isinstance(value, str):
        text(value, where)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            text(name, where)
            check_texts(item, where)
    elif isinstance(value, list):
        for item in value:
            check_texts(item, where)


def parse_json(value: str, where: str) -> Any:
    """JSON that a column holds as text."""
    try:
        return json.loads(value)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where} is no JSON ({error}): {value[:60]!r}") from None


def loss_weight(value: Any, where: str) -> float:
    """A finite number that is not negative."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise DataError(f"{where} must be a number from 0, found {kind(value)}")
    return float(value)


def names(row: Any) -> str:
    """The keys of a row, for errors."""
    return ", ".join(repr(key) for key in row) or "none"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return "an array" if value else "an empty array"
    return "an object"
