"""Read the rows of a data file as examples. This is the only place that knows the formats of data.

    prompt_completion   {"prompt": "...", "completion": "..."}, and `input` and `system` if data.columns names them;
                        both may be lists of messages, of which those of the prompt are not trained
    messages            {"messages": [{"role": "user", "content": "..."}, ...], "tools": [...]}
    sharegpt            {"conversations": [{"from": "human", "value": "..."}, ...], "system": "...", "tools": "[...]"}
    tokens              {"input_ids": [...], "labels": [...]} (-100: not trained), or "loss_mask" in place of labels
    text                {"text": "..."}

data.columns maps these names to those of the rows, which may be dotted (sft/data/reading/row.py). Rows that cannot be
read raise DataError with file, line and key. The turns of conversations are read by sft/data/reading/messages.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from launcher.contract.errors import DataError, did_you_mean
from launcher.contract.spec import DataSpec
from sft.data.reading.files import ByteRange, read_lines
from sft.data.reading.messages import (
    MESSAGE_COLUMNS,
    TURN_COLUMNS,
    Message,
    Tool,
    read_messages,
    read_sharegpt,
    read_tools,
    refuse_unread,
)
from sft.data.reading.row import MISSING, Row, find, get, get_text, kind, load, loss_weight, names, parse_json
from sft.data.reading.tables import holds_lines, place, read_rows

COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "tokens": ("input_ids",),
    "text": ("text",),
}
"""Keys that a row of each format must have. The first format that fits is taken."""

_OPTIONAL_COLUMNS = ("input", "system", "tools", "labels", "loss_mask")
_NOT_A_LABEL = -100


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: messages, or a prompt with its completion, or a text, or token ids."""

    where: str
    """File and line, for errors."""
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    prompt: str = ""
    completion: Optional[str] = None
    text: Optional[str] = None
    ids: Optional[tuple[int, ...]] = None
    weights: tuple[float, ...] = ()
    """Loss weight of each of `ids`."""


def check_columns(columns: Mapping[str, str], key: str) -> None:
    """Raise DataError, beginning with `key`, if data.columns maps a name that no format has."""
    known = {name for needed in COLUMNS.values() for name in needed}
    known |= {*MESSAGE_COLUMNS, *TURN_COLUMNS, *_OPTIONAL_COLUMNS}
    problems = [
        f"{key}: unknown name {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        for name in columns
        if name not in known
    ]
    if problems:
        raise DataError(problems)


def detect_format(files: Sequence[Path], spec: DataSpec, key: str) -> str:
    """Return data.format or, where that is `auto`, the format of the first row.

    Raise DataError, beginning with `key`, if there are no rows.
    """
    if spec.format != "auto":
        return spec.format
    for path in files:
        for where, row in _rows(path):
            return format_of(row, where, spec.columns)
    raise DataError(f"{key}: no rows in {', '.join(map(str, files))}")


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place for errors."""
    if holds_lines(path):
        lines = ByteRange(path, 0, path.stat().st_size, 1)
        yield from ((lines.where(number), load(line, lines.where(number))) for number, line in read_lines(lines))
    else:
        yield from ((place(path, number), row) for number, row in read_rows(path))


def format_of(row: Row, where: str, columns: Mapping[str, str]) -> str:
    """Return the format whose keys a row has, or raise DataError."""
    for name, wanted in COLUMNS.items():
        if all(find(row, columns.get(column, column)) is not MISSING for column in wanted):
            return name
    known = "; ".join(" and ".join(wanted) for wanted in COLUMNS.values())
    raise DataError(
        f"{where}: no format fits the keys {names(row)}; a row needs {known}; "
        "map the names with data.columns, e.g. {prompt: question}"
    )


def parse_row(line: bytes, where: str, row_format: str, columns: Mapping[str, str]) -> Example:
    """Return the example in one line, or raise DataError with `where` and the key."""
    row = load(line, where)
    refuse_unread(row, where)
    if row_format == "text":
        return Example(where=where, text=get_text(row, columns.get("text", "text"), where))
    if row_format == "tokens":
        return _tokens(row, where, columns)
    tools_key = columns.get("tools", "tools")
    tools = read_tools(row.get(tools_key), f"{where}: {tools_key!r}")
    if row_format == "prompt_completion":
        return _pair(row, where, columns, tools)
    (name,) = COLUMNS[row_format]
    key = columns.get(name, name)
    read = read_messages if row_format == "messages" else read_sharegpt
    value = get(row, key, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV has no lists
        value = parse_json(value, f"{where}: {key!r}")
    turns = read(value, f"{where}: {key}", columns)
    optional = columns.get("system", "system" if row_format == "sharegpt" else "")
    return Example(where=where, messages=(*_system(row, optional, where), *turns), tools=tools)


def _pair(row: Row, where: str, columns: Mapping[str, str], tools: tuple[Tool, ...]) -> Example:
    """Return the example of a prompt and its completion: two texts, or two lists of messages."""
    prompt_key, completion_key = (columns.get(name, name) for name in COLUMNS["prompt_completion"])
    system = _system(row, columns.get("system", ""), where)
    prompt, completion = get(row, prompt_key, where), get(row, completion_key, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = read_messages(prompt, f"{where}: {prompt_key}", columns)
        answers = read_messages(completion, f"{where}: {completion_key}", columns)
        untrained = tuple(dataclasses.replace(message, weight=message.weight or 0.0) for message in asked)
        return Example(where=where, messages=(*system, *untrained, *answers), tools=tools)
    question = get_text(row, prompt_key, where)
    if "input" in columns and (more := get_text(row, columns["input"], where)):
        question = f"{question}\n\n{more}"
    answer = get_text(row, completion_key, where)
    if system or tools:  # only a conversation can hold them
        turns = (*system, Message("user", question), Message("assistant", answer))
        return Example(where=where, messages=turns, tools=tools)
    return Example(where=where, prompt=question, completion=answer)


def _system(row: Row, key: str, where: str) -> tuple[Message, ...]:
    """Return the system turn that column `key` holds, or no turn where it is absent or empty."""
    if not key or find(row, key) in (MISSING, None, ""):
        return ()
    return (Message("system", get_text(row, key, where)),)


def parse_ids(row: Row, key: str, where: str) -> list[int]:
    """Return the token ids under `key`, or raise DataError."""
    ids = get(row, key, where)
    if not isinstance(ids, list) or not all(type(item) is int and 0 <= item < 2**31 for item in ids):
        raise DataError(f"{where}: {key!r} must be a list of token ids, found {kind(ids)}")
    return ids


def _tokens(row: Row, where: str, columns: Mapping[str, str]) -> Example:
    """Return the example of a row that was tokenized elsewhere; a loss mask takes precedence over labels."""
    id_key, label_key, mask_key = (columns.get(name, name) for name in ("input_ids", "labels", "loss_mask"))
    ids = parse_ids(row, id_key, where)
    mask, labels = row.get(mask_key), row.get(label_key)
    values = labels if mask is None else mask
    if not isinstance(values, list) or len(values) != len(ids):
        raise DataError(
            f"{where}: {len(ids)} {id_key!r} need as many {label_key!r} or {mask_key!r}, "
            f"found {len(values) if isinstance(values, list) else kind(values)}"
        )
    if mask is not None:
        weights = [loss_weight(float(w) if isinstance(w, bool) else w, f"{where}: {mask_key!r}") for w in values]
    else:
        for index, (token, label) in enumerate(zip(ids, values, strict=True)):
            if label not in (token, _NOT_A_LABEL):
                raise DataError(
                    f"{where}: {label_key}[{index}] is {label}, {id_key}[{index}] is {token}: a label must be the "
                    f"token at the same index or {_NOT_A_LABEL}; training shifts the labels, the data must not"
                )
        weights = [float(label != _NOT_A_LABEL) for label in values]
    return Example(where=where, ids=tuple(ids), weights=tuple(weights))
