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
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
)
from sft.data.reading.row import MISSING, Row, find, get, get_text, list_in, load, parse_json
from sft.data.reading.row_forms import COLUMNS, with_form_of
from sft.data.reading.tables import as_json, holds_lines, place, read_rows
from sft.data.reading.token_rows import read_tokens
from sft.data.reading.tool_results import check_results
from sft.data.reading.unread import unread_keys

OPTIONAL_COLUMNS = ("input", "system", "tools", "labels", "loss_mask")

_READ_COLUMNS = {
    "prompt_completion": ("prompt", "completion", "input", "system", "tools", *MESSAGE_COLUMNS),
    "messages": ("messages", "system", "tools", *MESSAGE_COLUMNS),
    "sharegpt": ("conversations", "system", "tools", *TURN_COLUMNS, *MESSAGE_COLUMNS),
    "tokens": ("input_ids", "labels", "loss_mask"),
    "text": ("text",),
}
"""Names in data.columns that rows of each format are read with."""

_APART: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (COLUMNS["prompt_completion"], ("input", "system", "tools")),
    (MESSAGE_COLUMNS, ()),
    (TURN_COLUMNS, ()),
)
"""Names that hold different things, each with those beside them that are read where they are mapped."""


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
    unread: tuple[str, ...] = field(default=(), compare=False)
    """Keys of the row that nothing reads."""
    columns: tuple[str, ...] = field(default=(), compare=False)
    """Names in data.columns whose key the row has."""


def check_columns(columns: Mapping[str, str], key: str) -> None:
    """Raise DataError, beginning with `key`, if data.columns maps a name that no format has, or two to one column."""
    known = {name for needed in COLUMNS.values() for name in needed}
    known |= {*MESSAGE_COLUMNS, *TURN_COLUMNS, *OPTIONAL_COLUMNS}
    problems = [
        f"{key}: unknown name {name!r}{did_you_mean(name, known)}; known: {', '.join(sorted(known))}"
        for name in columns
        if name not in known
    ]
    problems += [f"{key}: {problem}" for problem in _read_twice(columns)]
    if problems:
        raise DataError(problems)


def _read_twice(columns: Mapping[str, str]) -> Iterator[str]:
    """Yield the names of a question and its answer, or of a role and its text, that one column would be read for."""
    for needed, optional in _APART:
        if not columns.keys() & set(needed):
            continue
        read = {name: columns.get(name, name) for name in (*needed, *(name for name in optional if name in columns))}
        for name, other in itertools.combinations(read, 2):
            if read[name] == read[other]:
                yield f"{name} and {other} would both be read from {read[name]!r}; name another column"


def check_columns_read(columns: Mapping[str, str], formats: Collection[str], key: str) -> None:
    """Raise DataError, beginning with `key`, for a column that rows of none of these formats are read with.

    What it holds would be left out of training.
    """
    read = {name for row_format in formats for name in _READ_COLUMNS[row_format]}
    problems = [
        f"{key}: {name} is not read in rows of format {' or '.join(sorted(formats))}, so that {column!r} would be left "
        f"out of training; names read there: {', '.join(sorted(read))}. Remove it, or set data.format"
        for name, column in columns.items()
        if name not in read
    ]
    if problems:
        raise DataError(problems)


def with_detected_form(files: Sequence[Path], data: DataSpec, key: str) -> DataSpec:
    """Return `data` with the format and the columns of the first row, as far as it leaves them open.

    Raise DataError, beginning with `key`, if there are no rows.
    """
    if data.format != "auto" and (data.columns or data.format != "prompt_completion"):
        return data
    for path in files:
        for where, row in rows_of(path):
            return with_form_of(row, where, data)
    if data.format != "auto":
        return data
    raise DataError(f"{key}: no rows in {', '.join(map(str, files))}")


def read_first_row(files: Sequence[Path], data: DataSpec) -> None:
    """Raise DataError if the first row cannot be read as an example."""
    for path in files:
        for where, row in rows_of(path):
            parse_row(as_json(row).encode(), where, data.format, data.columns, data.ignore_keys)
            return


def rows_of(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a file, each with its place for errors."""
    if holds_lines(path):
        lines = ByteRange(path, 0, path.stat().st_size, 1)
        yield from ((lines.where(number), load(line, lines.where(number))) for number, line in read_lines(lines))
    else:
        yield from ((place(path, number), row) for number, row in read_rows(path))


def parse_row(
    line: bytes, where: str, row_format: str, columns: Mapping[str, str], ignored: Collection[str] = ()
) -> Example:
    """Return the example in one line, or raise DataError with `where` and the key.

    `ignored` are keys that may be left out although they change what should be trained.
    """
    row = load(line, where)
    example = _example(row, where, row_format, columns, ignored)
    found = tuple(name for name, key in columns.items() if find(row, key) is not MISSING)
    unread = unread_keys(row, where, row_format, columns, ignored)
    return dataclasses.replace(example, unread=unread, columns=found)


def _example(row: Row, where: str, row_format: str, columns: Mapping[str, str], ignored: Collection[str]) -> Example:
    if row_format == "text":
        return Example(where=where, text=get_text(row, columns.get("text", "text"), where))
    if row_format == "tokens":
        ids, weights = read_tokens(row, where, columns)
        return Example(where=where, ids=ids, weights=weights)
    tools_key = columns.get("tools", "tools")
    tools = read_tools(find(row, tools_key, None), f"{where}: {tools_key!r}")
    if row_format == "prompt_completion":
        return _pair(row, where, columns, tools, ignored)
    name = "messages" if row_format == "messages" else "conversations"
    key = columns.get(name, name)
    value = get(row, key, where)
    if isinstance(value, str) and value.lstrip().startswith("["):  # CSV has no lists
        value = parse_json(value, f"{where}: {key!r}")
    read = read_messages if row_format == "messages" else read_sharegpt
    turns = read(value, f"{where}: {key}", columns, ignored)
    check_results((f"{where}: {key}", turns))
    return Example(where=where, messages=after_system(row, turns, where, columns), tools=tools)


def _pair(
    row: Row, where: str, columns: Mapping[str, str], tools: tuple[Tool, ...], ignored: Collection[str]
) -> Example:
    """Return the example of a prompt and its completion: two texts, or two lists of messages."""
    prompt_key, completion_key = (columns.get(name, name) for name in COLUMNS["prompt_completion"])
    prompt, completion = get(row, prompt_key, where), get(row, completion_key, where)
    if _is_json_of_messages(prompt) and _is_json_of_messages(completion):
        raise DataError(
            f"{where}: {prompt_key!r} and {completion_key!r} hold lists of messages as JSON text, which would be "
            "trained as it is; write them as lists, in jsonl or Parquet, or in CSV all turns in one column 'messages'"
        )
    more = find(row, columns["input"]) if "input" in columns else None
    has_more = more not in (MISSING, None, "")  # many rows of instruction data have none
    if isinstance(prompt, list) and isinstance(completion, list):
        if has_more:
            raise DataError(f"{where}: {columns['input']!r} cannot be added to a prompt that is a list of messages")
        in_prompt, in_completion = (f"{where}: {key}" for key in (prompt_key, completion_key))
        questions = read_messages(prompt, in_prompt, columns, ignored)
        answers = read_messages(completion, in_completion, columns, ignored)
        check_results((in_prompt, questions), (in_completion, answers))
        context = (message if message.weight is not None else _as_context(message) for message in questions)
        turns = after_system(row, (*context, *answers), where, columns)
        return Example(where=where, messages=turns, tools=tools)
    question = get_text(row, prompt_key, where)
    if has_more:
        question = f"{question}\n\n{get_text(row, columns['input'], where)}"
    answer = get_text(row, completion_key, where)
    turns = after_system(row, (Message("user", question), Message("assistant", answer)), where, columns)
    if len(turns) > 2 or tools:  # only a conversation can hold them
        return Example(where=where, messages=turns, tools=tools)
    return Example(where=where, prompt=question, completion=answer)


def _is_json_of_messages(value: object) -> bool:
    """Return whether a value is the JSON text of a list of messages, as CSV would have to hold it."""
    turns = list_in(value) if isinstance(value, str) else None
    return bool(turns) and all(isinstance(turn, dict) and "role" in turn for turn in turns or ())


def _as_context(message: Message) -> Message:
    """Return a turn of a prompt whose row does not say what it weighs."""
    return dataclasses.replace(message, weight=0.0, is_context=True)


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
