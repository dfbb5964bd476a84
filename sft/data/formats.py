"""Rows of a data file -> examples: the one place that knows how people write data down.

    prompt_completion   {"prompt": "...", "completion": "..."}
    messages            {"messages": [{"role": "user", "content": "..."}, ...]}
    text                {"text": "..."}

data.columns maps our names to the row's. What cannot be read is an error that names file, line and key; what we
would have to leave out to read a row (tool calls, weights of single messages) is an error too, because a
model would be trained on something the user did not write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.errors import DataError, did_you_mean
from launcher.spec import DataSpec
from sft.data.files import ByteRange, read_lines

COLUMNS = {"prompt_completion": ("prompt", "completion"), "messages": ("messages",), "text": ("text",)}
"""Keys that a row of each format must have."""

_MESSAGE_COLUMNS = ("role", "content")
_NOT_READ = ("tools", "tool_calls", "function_call", "tool_call_id", "reasoning_content", "thinking", "train", "weight")
"""Keys that change what should be trained, and that are not read."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: either messages, or a prompt with its completion, or a text."""

    where: str
    """File and line, for errors."""
    messages: tuple[Message, ...] = ()
    prompt: str = ""
    completion: str | None = None
    text: str | None = None


def check_columns(spec: DataSpec) -> None:
    """Refuse names in data.columns that no format has."""
    known = {name for names in COLUMNS.values() for name in names} | set(_MESSAGE_COLUMNS)
    problems = [
        f"data.columns: unknown name {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        for name in spec.columns
        if name not in known
    ]
    if problems:
        raise DataError(problems)


def detect_format(files: Sequence[Path], spec: DataSpec, key: str) -> str:
    """data.format, or what the keys of the first row say."""
    if spec.format != "auto":
        return spec.format
    for path in files:
        for number, line in read_lines(ByteRange(path, 0, path.stat().st_size, 1)):
            where = f"{path}:{number}"
            row = _load(line, where)
            for name, columns in COLUMNS.items():
                if all(spec.columns.get(column, column) in row for column in columns):
                    return name
            wanted = "; ".join(" and ".join(columns) for columns in COLUMNS.values())
            raise DataError(
                f"{where}: the format cannot be told from the keys {_names(row)}; "
                f"known are {wanted}; map names with data.columns, e.g. {{prompt: question}}"
            )
    raise DataError(f"{key}: no rows in {', '.join(map(str, files))}")


def parse_row(line: bytes, where: str, row_format: str, columns: Mapping[str, str]) -> Example:
    """The example in one line; DataError names `where` and the key."""
    row = _load(line, where)
    _refuse_unread(row, where)
    if row_format == "messages":
        key = columns.get("messages", "messages")
        return Example(where=where, messages=_messages(_get(row, key, where), f"{where}: {key}", columns))
    if row_format == "text":
        return Example(where=where, text=_text(row, columns.get("text", "text"), where))
    prompt, completion = (_text(row, columns.get(name, name), where) for name in COLUMNS["prompt_completion"])
    return Example(where=where, prompt=prompt, completion=completion)


def _load(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        # A pretty-printed .json file: its first line is a lone bracket.
        hint = "; a data file holds one object a line" if line.strip() in (b"[", b"{") else ""
        raise DataError(f"{where}: malformed JSON at column {error.colno}: {error.msg}{hint}") from None
    except RecursionError:
        raise DataError(f"{where}: JSON is nested too deeply") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: {_kind(row)}, where a JSON object is needed; a data file holds one object a line")
    return row


def _messages(value: Any, where: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of messages, found {_kind(value)}")
    messages = []
    for index, item in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(item, dict):
            raise DataError(f"{at} must be an object with role and content, found {_kind(item)}")
        _refuse_unread(item, at)
        role, content = (_text(item, columns.get(name, name), at) for name in _MESSAGE_COLUMNS)
        messages.append(Message(role, content))
    return tuple(messages)


def _get(row: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: no key {key!r}; found {_names(row)}{did_you_mean(key, row)}")
    return row[key]


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = _get(row, key, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} must be a text, found {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(value[error.start]):04x}"
        raise DataError(f"{where}: {key!r} holds half a surrogate pair ({found}), which is no text") from None
    return value


def _refuse_unread(row: Mapping[str, Any], where: str) -> None:
    unread = [key for key in _NOT_READ if row.get(key) not in (None, [], {}, "", "[]")]
    unread = [key for key in unread if key not in ("train", "weight") or row[key] != 1]
    if unread:
        raise DataError(f"{where}: {', '.join(unread)} would be left out of training; remove it from the data")


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(key) for key in row) or "none"


def _kind(value: Any) -> str:
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
