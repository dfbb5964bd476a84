"""Read one row of a data file, a JSON object, and look up its keys.

Errors name file, line and key. A dotted key looks into nested values: `instances.0.input` is the `input` of the first
item of `instances`. A key that is present as written comes first, because names may contain dots.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Literal

from launcher.contract.errors import DataError, did_you_mean

Row = Mapping[str, object]
"""A JSON object, as it was read."""

MOST_NESTED = 100
"""Levels of objects and arrays in a row. Templates and this package walk values by recursion, which Python limits."""

LARGEST_WEIGHT = 1e6
"""Loss weights are float32; sums of larger ones lose what small ones add, and far larger ones are infinite."""
_SMALLEST_WEIGHT = 1e-30

TOO_DEEP = f"JSON is nested too deeply, in more than {MOST_NESTED} levels"

REASONING: tuple[Literal["reasoning_content", "reasoning", "thinking"], ...] = (
    "reasoning_content",
    "reasoning",
    "thinking",
)
"""Keys of a message that hold what an assistant thinks before it answers, all of which templates look for."""

BINARY = "bytes of binary data"
"""Key of the object that stands for binary data, which JSON does not have: its value is their number."""

MISSING = object()
"""What `find` returns for a key that is not present; None is a value that a row may have."""


def _one_value_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs of a JSON object as a dict, or raise ValueError for a key with two values."""
    found = dict(pairs)
    if len(found) < len(pairs):  # Python's own reader, like most, would keep the last value without a word
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"key {key!r} has two values in one object; keep one of them")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_one_value_each)
"""Reads JSON in which no key has two values. Made once, as `json.loads` would make one for each call."""


def load(line: bytes, where: str) -> dict[str, object]:
    """Return the JSON object in one line, or raise DataError beginning with `where`."""
    try:
        row: object = DECODER.decode(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        # The first line of a pretty-printed file is a single bracket.
        hint = "; a data file holds one object a line" if line.strip() in (b"[", b"{") else ""
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{where}: {TOO_DEEP}") from None
    except ValueError as error:  # a key with two values, or a number of more digits than Python converts
        raise DataError(f"{where}: malformed JSON: {error}") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {kind(row)}, where a JSON object is needed; a data file holds one object a line")
    check_depth(row, line.count(b"[") + line.count(b"{"), where)
    return row


def list_in(text: str) -> list[object] | None:
    """Return the list that a text holds as JSON, as CSV has to, or None: a prompt may begin with a bracket."""
    if not text.lstrip().startswith("["):
        return None
    try:
        found = DECODER.decode(text.strip())
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) else None


def find(row: object, key: str, default: object = MISSING) -> object:
    """Return the value of a possibly dotted key, or `default` where it is not present."""
    if isinstance(row, Mapping) and key in row:
        return row[key]
    head, _, rest = key.partition(".")
    if not rest:
        return row[int(head)] if isinstance(row, list) and head.isdecimal() and int(head) < len(row) else default
    inner = find(row, head)
    return default if inner is MISSING else find(inner, rest, default)


def get(row: Row, key: str, where: str) -> object:
    """Return the value of a possibly dotted key, or raise DataError where it is not present."""
    value = find(row, key)
    if value is MISSING:
        raise DataError(f"{where}: no key {key!r}; found {names(row)}{did_you_mean(key, row)}")
    return value


def get_text(row: Row, key: str, where: str) -> str:
    """Return the text of a possibly dotted key, or raise DataError where it is not present or not a text."""
    return text(get(row, key, where), f"{where}: {key!r}")


def text(value: object, where: str) -> str:
    """Return `value` if it is a text that UTF-8 can encode, or raise DataError."""
    if not isinstance(value, str):
        raise DataError(f"{where} must be a text, found {kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where} holds half a surrogate pair ({half}), which is no text") from None
    return value


def check_texts(value: object, where: str) -> None:
    """Raise DataError if a JSON value holds a text that UTF-8 cannot encode, keys included, or what JSON lacks."""
    if isinstance(value, str):
        text(value, where)
    elif isinstance(value, float) and not math.isfinite(value):  # which Python reads and writes, and JSON does not have
        raise DataError(f"{where} holds the number {value}, which JSON does not have; write null or a text")
    elif isinstance(value, Mapping):
        if value.keys() == {BINARY}:
            raise DataError(f"{where} holds {kind(value)}; write them as text")
        for name, item in value.items():
            text(name, where)
            check_texts(item, where)
    elif isinstance(value, list):
        for item in value:
            check_texts(item, where)


def parse_json(value: str, where: str) -> object:
    """Return the value of JSON that a column holds as text, or raise DataError."""
    try:
        parsed: object = DECODER.decode(value)
    except RecursionError:
        raise DataError(f"{where}: {TOO_DEEP}") from None
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): {value[:60]!r}") from None
    check_depth(parsed, value.count("[") + value.count("{"), where)
    return parsed


def loss_weight(value: object, where: str) -> float:
    """Return `value` if it is a number that can weigh a loss, or raise DataError."""
    number = value if isinstance(value, int | float) and not isinstance(value, bool) else -1
    if number == 0 or _SMALLEST_WEIGHT <= number <= LARGEST_WEIGHT:
        return float(number)
    raise DataError(f"{where} must be a number from 0 to {LARGEST_WEIGHT:,.0f}, found {kind(value)}")


def check_depth(value: object, brackets: int, where: str) -> None:
    """Raise DataError for a value of more than MOST_NESTED levels. `brackets` is how many its text opens."""
    if brackets <= MOST_NESTED:
        return
    level, depth = [value], 0
    while level := [item for each in level for item in _items(each)]:
        depth += 1
        if depth > MOST_NESTED:
            raise DataError(f"{where}: {TOO_DEEP}")


def _items(value: object) -> list[object]:
    """Return the objects and arrays in an object or array."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [item for item in inner if isinstance(item, dict | list)]


def _shortened(number: float) -> str:
    if isinstance(number, int) and number.bit_length() > 200:  # Python refuses to write out one of 4,300 digits
        return f"of {int(number.bit_length() * 0.30103):,} digits"
    return str(number)


def names(row: Iterable[str]) -> str:
    """Return the keys of a row, quoted and separated by commas, for errors."""
    return ", ".join(repr(key) for key in row) or "none"


def kind(value: object) -> str:
    """Return what a JSON value is, in words, for errors."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the boolean {str(value).lower()}"
    if isinstance(value, (int, float)):
        return f"the number {_shortened(value)}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    if isinstance(value, list):
        return "an array" if value else "an empty array"
    if isinstance(value, dict) and value.keys() == {BINARY}:
        return f"{value[BINARY]} {BINARY}"
    return "an object"
