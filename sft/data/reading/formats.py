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

from launcher.contract.errors import DataError, did_you_mean
from launcher.contract.spec import DataSpec
from sft.data.reading.files import ByteRange, read_lines
from sft.data.reading.messages import (
    MESSAGE_COLUMNS,
    NOT_READ_IN_ROWS,
    TURN_COLUMNS,
    Message,
    Tool,
    read_messages,
    read_sharegpt,
    read_tools,
    refuse_unread,
)
from sft.data.reading.row import MISSING, Row, find, get, get_text, load, names, parse_json
from sft.data.reading.tables import holds_lines, place, read_rows
from sft.data.reading.token_rows import read_tokens

COLUMNS = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "tokens": ("input_ids",),
    "text": ("text",),
}
"""Keys that a row of each format must have. The first format that fits is taken."""

_OPTIONAL_COLUMNS = ("input", "system", "tools", "labels", "loss_mask")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One row: messages, or a prompt with its completion, or a text, or token ids."""

    where: str
    """File and line, for errors."""
    messages: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()
    prompt: str = ""
    completion: str | None = None
    text: str | None = None
    ids: tuple[int, ...] | None = None
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
    refuse_unread(row, where, [name for name in NOT_READ_IN_ROWS if name not in columns.values()])
    if row_format == "text":
        return Example(where=where, text=get_text(row, columns.get("text", "text"), where))
    if row_format == "tokens":
        ids, weights = read_tokens(row, where, columns)
        return Example(where=where, ids=ids, weights=weights)
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
    return Example(where=where, messages=after_system(row, turns, where, columns), tools=tools)


def _pair(row: Row, where: str, columns: Mapping[str, str], tools: tuple[Tool, ...]) -> Example:
    """Return the example of a prompt and its completion: two texts, or two lists of messages."""
    prompt_key, completion_key = (columns.get(name, name) for name in COLUMNS["prompt_completion"])
    prompt, completion = get(row, prompt_key, where), get(row, completion_key, where)
    if isinstance(prompt, list) and isinstance(completion, list):
        questions = read_messages(prompt, f"{where}: {prompt_key}", columns)
        answers = read_messages(completion, f"{where}: {completion_key}", columns)
        untrained = tuple(dataclasses.replace(message, weight=message.weight or 0.0) for message in questions)
        turns = after_system(row, (*untrained, *answers), where, columns)
        return Example(where=where, messages=turns, tools=tools)
    question = get_text(row, prompt_key, where)
    if "input" not in (*columns, *columns.values()) and row.get("input") not in (None, ""):
        raise DataError(
            f"{where}: 'input' would be left out, but the answer may depend on it; add it to the prompt with "
            "data.columns: {input: input}, or remove it from the data"
        )
    if "input" in columns and (more := get_text(row, columns["input"], where)):
        question = f"{question}\n\n{more}"
    answer = get_text(row, completion_key, where)
    turns = after_system(row, (Message("user", question), Message("assistant", answer)), where, columns)
    if len(turns) > 2 or tools:  # only a conversation can hold them
        return Example(where=where, messages=turns, tools=tools)
    return Example(where=where, prompt=question, completion=answer)


def after_system(row: Row, turns: tuple[Message, ...], where: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """Return the turns after the system turn that column `system` holds, if it holds one, or raise DataError."""
    key = columns.get("system", "system")
    if find(row, key) in (MISSING, None, ""):
        return turns
    system = Message("system", get_text(row, key, where))
    if turns[:1] and turns[0].role == "system":
        if turns[0].content == system.content:
            return turns
        raise DataError(f"{where}: {key!r} and the first turn are two system prompts; keep one of them")
    return (system, *turns)
