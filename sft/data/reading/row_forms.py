"""Recognize rows: which format they have, and which columns the files of other trainers use for it.

    alpaca      {"instruction": ..., "input": ..., "output": ..., "system": ...}, Dolly's context and response as well
    sharegpt    {"conversations": [{"role": ..., "content": ...}]}

Files for other objectives than the next token of an answer are refused by a sentence that says what they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.reading.row import MISSING, Row, find, names

RowFormat = Literal["prompt_completion", "messages", "sharegpt", "tokens", "text"]

COLUMNS: dict[RowFormat, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "tokens": ("input_ids",),
    "text": ("text",),
}
"""Keys that a row of each format must have. The first format that fits is taken."""

_INSTRUCTIONS = (("instruction", "output", "input"), ("instruction", "response", "context"))
"""Prompt, completion and what is appended to the prompt, as instruction data sets name them."""

_CHOSEN = (
    "rows of chosen and rejected are preference pairs, as for DPO; this trains one answer a row. To train on the "
    "chosen ones map {columns}; to learn from the pairs use a preference trainer"
)
_NO_ANSWER = (
    "a row holds a prompt and no answer, as for PPO or GRPO, where the model writes the answers; "
    "map the answers with data.columns: {completion: ...}"
)


def with_form_of(row: Row, where: str, data: DataSpec) -> DataSpec:
    """Return `data` with the format that this row has and, where nobody maps them, the columns that it uses.

    Raise DataError where no format fits the row.
    """
    fitting = [name for name, wanted in COLUMNS.items() if _has(row, [data.columns.get(key, key) for key in wanted])]
    # Before `text`, in which Alpaca's own files repeat prompt and answer as one.
    columns = _instruction_columns(row, data) if fitting in ([], ["text"]) else None
    if columns is not None:
        return dataclasses.replace(data, format="prompt_completion", columns=columns)
    if data.format != "auto":
        return data
    several = [name for name in fitting if name != "text"]
    if len(several) > 1:
        raise DataError(
            f"{where}: the keys {names(row)} fit several formats, of which only one would be trained; set data.format "
            f"to {' or '.join(several)}"
        )
    if fitting:
        return dataclasses.replace(data, format=fitting[0])
    _refuse_other_objectives(row, where)
    known = "; ".join(" and ".join(wanted) for wanted in COLUMNS.values())
    raise DataError(
        f"{where}: no format fits the keys {names(row)}; a row needs {known}; "
        "map the names with data.columns, e.g. {prompt: question}"
    )


def _has(row: Row, keys: Sequence[str]) -> bool:
    return all(find(row, key) is not MISSING for key in keys)


def _instruction_columns(row: Row, data: DataSpec) -> dict[str, str] | None:
    """Return the columns of a row of instruction data, or None if it is none or somebody has mapped its columns."""
    if data.columns or data.format not in ("auto", "prompt_completion") or "prompt" in row:
        return None
    for prompt, completion, more in _INSTRUCTIONS:
        if prompt in row and completion in row:
            return {"prompt": prompt, "completion": completion, "input": more}
    return None


def _refuse_other_objectives(row: Mapping[str, object], where: str) -> None:
    """Raise DataError for a row whose keys say that it is for another objective."""
    if "chosen" in row and "rejected" in row:
        is_whole = isinstance(row["chosen"], list) and "prompt" not in row
        columns = "data.columns: {messages: chosen}" if is_whole else "data.columns: {completion: chosen}"
        raise DataError(f"{where}: {_CHOSEN.format(columns=columns)}")
    if "prompt" in row and not {"completion", "response", "output", "answer"} & set(row):
        raise DataError(f"{where}: {_NO_ANSWER}")
