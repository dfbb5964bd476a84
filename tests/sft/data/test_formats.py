"""Rows -> examples, and the exact message for each way a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import DataError
from launcher.spec import DataSpec
from sft.data.formats import Example, Message, check_columns, detect_format, parse_row


def parse(row: Any, row_format: str = "messages", columns: dict[str, str] | None = None) -> Example:
    line = row if isinstance(row, bytes) else json.dumps(row).encode()
    return parse_row(line, "a.jsonl:3", row_format, columns or {})


def test_messages() -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}], "id": 7}
    assert parse(row).messages == (Message("user", "hi"), Message("assistant", "yo"))


def test_columns_map_our_names_to_the_rows() -> None:
    turns = {"conversation": [{"from": "user", "value": "hi"}]}
    columns = {"messages": "conversation", "role": "from", "content": "value"}
    assert parse(turns, columns=columns).messages == (Message("user", "hi"),)
    example = parse({"q": "2+2", "a": "4"}, "prompt_completion", {"prompt": "q", "completion": "a"})
    assert (example.prompt, example.completion) == ("2+2", "4")
    assert parse({"body": "x"}, "text", {"text": "body"}) == Example(where="a.jsonl:3", text="x")


def test_a_byte_order_mark_and_carriage_returns_are_harmless() -> None:
    assert parse(b'\xef\xbb\xbf{"text": "x"}\r\n', "text").text == "x"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"messages": [}', "a.jsonl:3: malformed JSON at column 15: Expecting value"),
        (
            b"[\n",
            "a.jsonl:3: malformed JSON at column 2: Expecting value; a data file holds one object a line",
        ),
        (b"\xff", "a.jsonl:3: not UTF-8 (byte 1 of the line)"),
        (b"[1]", "a.jsonl:3: an array, where a JSON object is needed; a data file holds one object a line"),
        (b"[" * 100_000, "a.jsonl:3: JSON is nested too deeply"),
        ({"message": []}, "a.jsonl:3: no key 'messages'; found 'message'; did you mean 'message'?"),
        ({"messages": "hi"}, "a.jsonl:3: messages must be a list of messages, found the text 'hi'"),
        ({"messages": []}, "a.jsonl:3: messages must be a list of messages, found an empty array"),
        (
            {"messages": ["hi"]},
            "a.jsonl:3: messages[0] must be an object with role and content, found the text 'hi'",
        ),
        ({"messages": [{"role": "user"}]}, "a.jsonl:3: messages[0]: no key 'content'; found 'role'"),
        (
            {"messages": [{"role": "user", "content": None}]},
            "a.jsonl:3: messages[0]: 'content' must be a text, found null",
        ),
        (
            {"messages": [{"role": "user", "content": True}]},
            "a.jsonl:3: messages[0]: 'content' must be a text, found the boolean true",
        ),
        (
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            "a.jsonl:3: messages[0]: 'content' holds half a surrogate pair (\\ud800), which is no text",
        ),
    ],
)
def test_a_bad_row_is_named_with_what_was_found(row: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse(row)
    assert str(caught.value) == message


def test_what_would_be_left_out_is_refused() -> None:
    turn = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    with pytest.raises(DataError, match=r"messages\[0\]: tool_calls would be left out of training"):
        parse({"messages": [turn]})
    with pytest.raises(DataError, match=r"messages\[0\]: train would be left out"):
        parse({"messages": [{"role": "assistant", "content": "x", "train": False}]})
    harmless = {"role": "assistant", "content": "x", "train": True, "weight": 1.0, "tool_calls": None}
    assert parse({"messages": [harmless], "tools": "[]"}).messages == (Message("assistant", "x"),)


def test_the_format_is_told_from_the_first_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for row, columns, expected in (
        ({"prompt": "", "completion": ""}, {}, "prompt_completion"),
        ({"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"messages": [], "text": ""}, {}, "messages"),
        ({"text": ""}, {}, "text"),
    ):
        file.write_text("\n  \n" + json.dumps(row) + "\n")
        assert detect_format([file], DataSpec(columns=columns), "data.train") == expected
    assert detect_format([file], DataSpec(format="messages"), "data.train") == "messages"


def test_an_unknown_format_names_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"question": "", "answer": ""}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: the format cannot be told from the keys 'question', 'answer'"):
        detect_format([file], DataSpec(), "data.train")
    file.write_text("\n\n")
    with pytest.raises(DataError, match=r"data\.train: no rows in .*a\.jsonl"):
        detect_format([file], DataSpec(), "data.train")


def test_an_unknown_column_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match=r"data\.columns: unknown name 'promt'; did you mean 'prompt'\?"):
        check_columns(DataSpec(columns={"promt": "question"}))
    check_columns(DataSpec(columns={"prompt": "question", "completion": "answer"}))
