"""Read the rows of evaluation.prompts: what is asked, before a tokenizer sees it.

Without torch, numpy and transformers: the launcher looks at the first rows on a login node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import DataError
from launcher.contract.named_templates import NONE
from launcher.contract.spec import DataSpec
from sft.data.reading.formats import after_system
from sft.data.reading.messages import Message, Tool, read_messages, read_tools
from sft.data.reading.row import Row, load
from sft.data.reading.token_rows import parse_ids
from sft.data.reading.tool_results import check_results
from sft.data.reading.unread import refuse_in_prompt


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A question in words or as a conversation, or the token ids that were made of it."""

    question: str
    """The text of `prompt`, empty in a row with messages."""
    ids: tuple[int, ...] | None = None
    turns: tuple[Message, ...] = ()
    tools: tuple[Tool, ...] = ()


def read_prompt_rows(path: Path, data: DataSpec) -> Iterator[tuple[str, PromptRow]]:
    """Yield place and prompt of each line of a jsonl file that is not blank. Raise DataError where one is wrong."""
    yield from ((where, _prompt_row(row, where, data)) for where, row in _rows(path))


def prompt_keys(path: Path) -> set[str]:
    """Return the keys of all rows. Raise DataError where one is no object of JSON."""
    return {key for _, row in _rows(path) for key in row}


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with path.open("rb") as lines:  # bytes end at line feeds alone, and JSON texts may hold what else ends a line
            for number, line in enumerate(lines, start=1):
                where = f"evaluation.prompts: {path}:{number}"
                if line.strip():
                    yield where, load(line, where)
    except OSError as error:
        raise DataError(f"evaluation.prompts: {path} cannot be read: {error}") from error


def _prompt_row(row: Row, where: str, data: DataSpec) -> PromptRow:
    """Return the prompt in a row, or raise DataError where it has none, or more than would be asked."""
    question = row.get("prompt")
    if not isinstance(question, str) and "messages" not in row:
        raise DataError(f"{where}: a row has prompt (a text) or messages")
    if "input_ids" in row and isinstance(question, str):
        return PromptRow(question, tuple(parse_ids(row, "input_ids", where)))
    refuse_in_prompt(row, where, data.ignore_keys)
    tools = read_tools(row.get("tools"), f"{where}: 'tools'")
    if "messages" in row:
        turns = read_messages(row["messages"], f"{where}: messages", {})
        check_results((f"{where}: messages", turns))
    else:
        turns = (Message("user", str(question)),)
    turns = after_system(row, turns, where, {})
    if turns[-1].role == "assistant":
        raise DataError(f"{where}: the last turn is the assistant's; a prompt ends with what is to be answered")
    if data.chat_template == NONE and ("messages" in row or len(turns) > 1 or tools):
        raise DataError(f"{where}: messages, system and tools need a chat template, and data.chat_template is none")
    return PromptRow(question if isinstance(question, str) else "", turns=turns, tools=tools)
