"""Rows -> examples, and the exact message for each way a row can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.reading.formats import Example, check_columns, parse_row, with_detected_form
from sft.data.reading.messages import Message


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
        (b"[" * 100_000, "a.jsonl:3: JSON is nested too deeply, in more than 100 levels"),
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


def test_what_no_template_could_be_given_is_refused() -> None:
    """If the key were ignored, the turn would be trained without its call."""
    turn = {"role": "assistant", "content": "", "function_call": {"name": "f"}}
    with pytest.raises(DataError, match=r"messages\[0\]: function_call would be left out of training"):
        parse({"messages": [turn]})
    with pytest.raises(DataError, match=r"a\.jsonl:3: images would be left out of training"):
        parse({"messages": [{"role": "user", "content": "x"}], "images": ["a.png"]})
    image = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(DataError, match=r"'content' holds a part of type 'image'"):
        parse({"messages": [image]})


CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "row_format"),
    [
        ({"system": "Answer in French.", "messages": CHAT}, "messages"),
        ({"system": "Answer in French.", "prompt": "hi", "completion": "yo"}, "prompt_completion"),
        ({"system": "Answer in French.", "prompt": CHAT[:1], "completion": CHAT[1:]}, "prompt_completion"),
    ],
)
def test_a_system_key_is_read_in_every_form_of_conversation(row: Any, row_format: str) -> None:
    """Seen to be dropped without a word beside `messages` and `prompt`."""
    example = parse(row, row_format)
    assert [message.content for message in example.messages] == ["Answer in French.", "hi", "yo"]
    assert example.messages[0].role == "system"


def test_two_system_prompts_are_refused() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    assert len(parse({"system": "Be brief.", "messages": turns}).messages) == 3
    with pytest.raises(DataError, match=r"a\.jsonl:3: 'system' and the first turn are two system prompts"):
        parse({"system": "Answer in French.", "messages": turns})


def test_keys_that_change_the_meaning_of_a_row_are_refused_where_nobody_reads_them() -> None:
    """Seen to be dropped without a word."""
    with pytest.raises(DataError, match="history would be left out of training"):
        parse({"history": [["a", "b"]], "messages": CHAT})
    row = {"prompt": "Translate.", "input": "hello", "completion": "bonjour"}
    with pytest.raises(DataError, match="input would be left out of training, and the answer may depend on it"):
        parse(row, "prompt_completion")
    assert parse(row, "prompt_completion", {"input": "input"}).prompt == "Translate.\n\nhello"
    assert parse({**row, "input": ""}, "prompt_completion").prompt == "Translate."
    assert parse(row, "prompt_completion", {"prompt": "input"}).prompt == "hello"
    assert parse({"history": CHAT}, "messages", {"messages": "history"}).messages[0].content == "hi"


def tokens(**more: Any) -> Any:
    return {"input_ids": [0, 0, 5, 6, 7, 0], "labels": [-100, -100, -100, 6, 7, -100], **more}


def test_padding_of_ids_is_left_out() -> None:
    """Seen to be context of the tokens behind it."""
    example = parse(tokens(attention_mask=[0, 0, 1, 1, 1, 0]), "tokens")
    assert example.ids == (5, 6, 7)
    assert example.weights == (0.0, 1.0, 1.0)
    positions = parse(tokens(attention_mask=[0, 0, 1, 1, 1, 0], position_ids=[0, 0, 0, 1, 2, 3]), "tokens")
    assert positions.ids == (5, 6, 7)
    assert parse(tokens(position_ids=[0, 1, 2, 3, 4, 5], seq_lengths=[6], cu_seqlens=[0, 6]), "tokens").ids is not None


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"attention_mask": [1, 0, 1, 1, 1, 1]}, "has zeros between ones"),
        ({"attention_mask": [0, 0, 1, 1, 0, 0]}, "tokens whose 'attention_mask' is 0 are trained"),
        ({"attention_mask": [1, 1]}, "must be a list of 6 zeros and ones"),
        ({"attention_mask": [0] * 6}, "has no 1"),
        ({"position_ids": [0, 1, 2, 0, 1, 2]}, "'position_ids' do not count up from 0"),
        ({"seq_lengths": [3, 3]}, "'seq_lengths' names 2 sequences"),
        ({"cu_seqlens": [0, 3, 6]}, "'cu_seqlens' names 2 sequences"),
        ({"segment_ids": [0, 0, 0, 1, 1, 1]}, "'segment_ids' names several sequences"),
    ],
)
def test_what_ids_say_of_padding_and_sequences_is_kept_or_refused(more: Any, message: str) -> None:
    """Seen to be ignored: rows of several sequences were trained as one."""
    with pytest.raises(DataError, match=message):
        parse(tokens(**more), "tokens")


def test_dotted_columns_go_down() -> None:
    row = {"instances": [{"input": "3, 4", "output": "7"}], "a.b": "as it is", "a": {"b": "down"}}
    columns = {"prompt": "a.b", "input": "instances.0.input", "completion": "instances.0.output"}
    example = parse(row, "prompt_completion", columns)
    assert (example.prompt, example.completion) == ("as it is\n\n3, 4", "7")
    empty = parse({**row, "instances": [{"input": "", "output": "7"}]}, "prompt_completion", columns)
    assert empty.prompt == "as it is"
    with pytest.raises(DataError, match=r"a\.jsonl:3: no key 'instances\.1\.output'; found 'instances', 'a\.b', 'a'"):
        parse(row, "prompt_completion", {"prompt": "a.b", "completion": "instances.1.output"})


def test_dotted_columns_of_tools_and_masks_go_down() -> None:
    """Seen to be left out without a word: the tools were absent, and the labels were trained in place of the mask."""
    tools = [{"name": "f", "description": "d"}]
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    chat = json.dumps({"messages": turns, "more": {"tools": tools}}).encode()
    assert parse_row(chat, "a:1", "messages", {"tools": "more.tools"}).tools[0]["function"]["name"] == "f"
    ids = {"input_ids": [1, 2, 3], "more": {"mask": [0, 0, 1], "labels": [-100, -100, 3]}}
    for columns in ({"loss_mask": "more.mask"}, {"labels": "more.labels"}):
        assert parse_row(json.dumps(ids).encode(), "a:1", "tokens", columns).weights == (0.0, 0.0, 1.0)
    both = json.dumps({**ids, "labels": [1, 2, 3]}).encode()
    with pytest.raises(DataError, match="do not train the same tokens"):
        parse_row(both, "a:1", "tokens", {"loss_mask": "more.mask"})


def test_a_system_column_and_tools_make_a_conversation_of_a_pair() -> None:
    row = {"prompt": "hi", "completion": "yo", "rule": "be brief", "tools": '[{"name": "f"}]'}
    example = parse(row, "prompt_completion", {"system": "rule"})
    assert [message.role for message in example.messages] == ["system", "user", "assistant"]
    assert example.tools == ({"type": "function", "function": {"name": "f"}},)


def test_turns_of_a_conversational_prompt_are_not_trained() -> None:
    """Answers in the prompt are only what the completion replies to."""
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    example = parse({"prompt": prompt, "completion": [{"role": "assistant", "content": "d"}]}, "prompt_completion")
    assert [message.weight for message in example.messages] == [0.0, 0.0, 0.0, None]


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "Rain?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"city": "Paris"}}'},
        {"from": "observation", "value": "0"},
        {"from": "gpt", "value": "No."},
    ]
    example = parse({"conversations": turns, "system": "Be brief.", "tools": "[]"}, "sharegpt")
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Paris"}}}
    assert example.messages == (
        Message("system", "Be brief."),
        Message("user", "Rain?"),
        Message("assistant", "", None, {"tool_calls": [call]}),
        Message("tool", "0"),
        Message("assistant", "No."),
    )
    assert example.tools == ()
    with pytest.raises(DataError, match=r"conversations\[0\]: unknown role 'bing'; known are human, user, gpt"):
        parse({"conversations": [{"from": "bing", "value": "x"}]}, "sharegpt")
    with pytest.raises(DataError, match=r"conversations\[0\]: 'value' is not JSON .*: 'f\(\)'"):
        parse({"conversations": [{"from": "function_call", "value": "f()"}]}, "sharegpt")


def test_ids_come_with_labels_or_a_mask() -> None:
    example = parse({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "tokens")
    assert (example.ids, example.weights) == ((5, 6, 7), (0.0, 1.0, 1.0))
    masked = parse({"input_ids": [5, 6], "loss_mask": [False, 0.5]}, "tokens")
    assert masked.weights == (0.0, 0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"input_ids": [1, -2]}, "'input_ids' must be a list of token ids, found an array"),
        ({"input_ids": [1, 2]}, "2 'input_ids' need as many 'labels' or 'loss_mask', found null"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 'input_ids' need as many 'labels' or 'loss_mask', found 1"),
        (
            {"input_ids": [1, 2], "loss_mask": [1, -1]},
            "'loss_mask' must be a number from 0 to 1,000,000, found the number -1",
        ),
        (
            {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
            "labels[0] is 2, input_ids[0] is 1: a label must be the token at the same index or -100; training shifts "
            "the labels, the data must not",
        ),
    ],
)
def test_ids_that_cannot_be_right_are_refused(row: dict[str, Any], message: str) -> None:
    """Labels that are already shifted would train each token to predict the one after the next."""
    with pytest.raises(DataError) as caught:
        parse(row, "tokens")
    assert str(caught.value) == f"a.jsonl:3: {message}"


def test_the_weight_of_a_message() -> None:
    def weight(**more: Any) -> float | None:
        return parse({"messages": [{"role": "assistant", "content": "x", **more}]}).messages[0].weight

    assert (weight(), weight(train=True), weight(train=False), weight(weight=0.5)) == (None, 1.0, 0.0, 0.5)
    assert (weight(train=False, weight=1), weight(train=True, weight=0.5)) == (0.0, 0.5)
    for more in ({"weight": -1}, {"weight": float("nan")}, {"weight": True}, {"weight": "1"}, {"train": 1}):
        with pytest.raises(DataError, match=r"a\.jsonl:3: messages\[0\]: '(weight|train)' must be"):
            weight(**more)


def test_tool_calls_come_in_one_form() -> None:
    """Arguments may be JSON text, as OpenAI writes them, and calls and tools may be bare."""
    calls = [{"id": "1", "function": {"name": "f", "arguments": '{"a": 1}'}}, {"name": "g"}]
    row = {"messages": [{"role": "assistant", "tool_calls": calls}], "tools": [{"name": "f"}, {"name": "g"}]}
    example = parse(row)
    assert example.messages[0].content == ""
    assert example.messages[0].extra["tool_calls"] == [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}},
        {"type": "function", "function": {"name": "g", "arguments": {}}},
    ]
    assert [tool["type"] for tool in example.tools] == ["function", "function"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tool_calls": [1]}, "messages[0]: tool_calls: a call must be an object with name and arguments, found"),
        ({"tool_calls": [{"name": "f", "arguments": "{"}]}, "arguments of 'f' is not JSON"),
        (
            {"tool_calls": [{"name": "f", "arguments": "[]"}]},
            "arguments of 'f' must be an object, found an empty array",
        ),
        ({"tool_calls": [{"name": "\ud800"}]}, "holds half a surrogate pair"),
        (
            {"tool_calls": [{"name": "f", "parameters": {"x": 1}}]},
            "the call of 'f' has no 'arguments' beside its name; found 'parameters'",
        ),
        (
            {"tool_calls": [{"type": "function", "function": {"name": "f"}, "arguments": {"x": 1}}]},
            "the call of 'f' has no 'arguments' beside its name; found 'arguments'",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": {}, "content_type": "code"}]},
            "content_type 'code' of 'f' is not read; only json is",
        ),
        (
            {"tool_calls": [{"name": "f", "arguments": '{"x": 1, "x": 2}'}]},
            "arguments of 'f' is not JSON (key 'x' has two values in one object",
        ),
        ({"tool_calls": [{"name": "f", "arguments": {"x": float("nan")}}]}, "holds the number nan, which JSON"),
        ({"tool_calls": [{"name": "f", "arguments": '{"x": -Infinity}'}]}, "holds the number -inf"),
    ],
)
def test_a_bad_tool_call_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        parse({"messages": [{"role": "assistant", **row}]})
    assert message in str(caught.value)


def test_bad_tools_are_named() -> None:
    messages = [{"role": "user", "content": "x"}]
    for tools, message in (
        ("{", "is not JSON"),
        ({}, "must be a list of objects"),
        ([{}], "a tool has no name"),
        ([{"function": "f"}], "a tool's 'function' must be an object, found the text 'f'"),
    ):
        with pytest.raises(DataError, match=f"a.jsonl:3: 'tools'.*{message}"):
            parse({"messages": messages, "tools": tools})


def test_the_format_is_told_from_the_first_row(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    for row, columns, expected in (
        ({"prompt": "", "completion": ""}, {}, "prompt_completion"),
        ({"question": "", "answer": ""}, {"prompt": "question", "completion": "answer"}, "prompt_completion"),
        ({"messages": [], "text": ""}, {}, "messages"),
        ({"text": ""}, {}, "text"),
        ({"conversations": []}, {}, "sharegpt"),
        ({"input_ids": [], "labels": []}, {}, "tokens"),
        ({"a": {"b": ""}}, {"text": "a.b"}, "text"),
    ):
        file.write_text("\n  \n" + json.dumps(row) + "\n")
        assert with_detected_form([file], DataSpec(columns=columns), "data.train").format == expected
    assert with_detected_form([file], DataSpec(format="messages"), "data.train").format == "messages"


def test_an_unknown_format_names_the_keys(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"question": "", "answer": ""}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no format fits the keys 'question', 'answer'"):
        with_detected_form([file], DataSpec(), "data.train")
    file.write_text("\n\n")
    with pytest.raises(DataError, match=r"data\.train: no rows in .*a\.jsonl"):
        with_detected_form([file], DataSpec(), "data.train")


@pytest.mark.parametrize(
    ("columns", "names"),
    [
        ({"prompt": "completion"}, "prompt and completion would both be read from 'completion'"),
        ({"prompt": "text", "completion": "text"}, "prompt and completion would both be read from 'text'"),
        ({"prompt": "q", "completion": "a", "input": "a"}, "completion and input would both be read from 'a'"),
        ({"content": "role"}, "role and content would both be read from 'role'"),
        ({"from": "value"}, "from and value would both be read from 'value'"),
    ],
)
def test_a_column_is_read_for_one_thing(columns: dict[str, str], names: str) -> None:
    """Seen to train a model to say the prompt again."""
    with pytest.raises(DataError, match=rf"data\.columns: {names}; name another column"):
        check_columns(columns, "data.columns")


@pytest.mark.parametrize(
    "columns",
    [
        {"messages": "content"},
        {"messages": "turns", "system": "prompt"},
        {"from": "role", "value": "content"},
        {"role": "from", "content": "value"},
        {"labels": "input_ids"},
        {"prompt": "completion", "completion": "prompt"},
    ],
)
def test_columns_that_only_look_alike(columns: dict[str, str]) -> None:
    check_columns(columns, "data.columns")


def test_an_unknown_column_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(DataError, match=r"data\.columns: unknown name 'promt'; did you mean 'prompt'\?"):
        check_columns({"promt": "question"}, "data.columns")
    check_columns({"prompt": "question", "completion": "answer"}, "data.columns")


@pytest.mark.parametrize(
    "line",
    [
        b'{"messages": [{"role": "user", "content": "A", "content": "B"}]}',
        b'{"messages": [{"role": "user", "content": "A"}], "messages": []}',
    ],
)
def test_a_key_with_two_values_is_refused(line: bytes) -> None:
    """Seen to train the last one, as Python reads it; two equal values say one thing."""
    with pytest.raises(DataError, match=r"a\.jsonl:3: malformed JSON: key '(content|messages)' has two values"):
        parse(line)
    assert parse(b'{"text": "x", "text": "x"}', "text").text == "x"


@pytest.mark.parametrize("role", ["gpt", "model", "Assistant", "assistant "])
def test_another_word_for_the_assistant_is_refused(role: str) -> None:
    """Seen to be a turn that nothing is trained of: such rows were dropped, or lost their last answers."""
    with pytest.raises(DataError, match=rf"messages\[1\]: the turns of role '{role}' would not be trained"):
        parse({"messages": [{"role": "user", "content": "hi"}, {"role": role, "content": "yo"}]})


@pytest.mark.parametrize(
    ("role", "meant"), [("User", "user"), ("human", "user"), ("System", "system"), ("Tool", "tool")]
)
def test_another_word_for_a_role_is_refused(role: str, meant: str) -> None:
    """Seen to be trained on: most templates write any role, and models know no turns of `human`."""
    turns = [{"role": role, "content": "hi"}, {"role": "assistant", "content": "yo"}]
    with pytest.raises(DataError, match=rf"messages\[0\]: role '{role}' is none that models know; write '{meant}'"):
        parse({"messages": turns})
    for known in ("developer", "observation", "ipython"):
        assert parse({"messages": [{**turns[0], "role": known}, turns[1]]}).messages[0].role == known


def test_reasoning_of_another_than_the_assistant_is_refused() -> None:
    """Templates leave it out without a word."""
    turn = {"role": "user", "content": "hi", "reasoning_content": "hm"}
    with pytest.raises(DataError, match=r"messages\[0\]: 'reasoning_content' of a turn of 'user'"):
        parse({"messages": [turn]})
    assert parse({"messages": [{**turn, "reasoning_content": ""}]}).messages[0].content == "hi"


@pytest.mark.parametrize(
    ("row", "formats"),
    [
        ({"prompt": "hi", "completion": "yo", "messages": CHAT}, "prompt_completion or messages"),
        ({"input_ids": [1], "labels": [1], "messages": CHAT}, "messages or tokens"),
    ],
)
def test_rows_of_several_formats_need_a_choice(row: dict[str, Any], formats: str, tmp_path: Path) -> None:
    """Seen to train the first that fits."""
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({**row, "text": "hi yo"}))
    with pytest.raises(DataError, match=rf"a\.jsonl:1: the keys .* fit several formats.* data\.format to {formats}"):
        with_detected_form([file], DataSpec(), "data.train")
    assert with_detected_form([file], DataSpec(format="messages"), "data.train").format == "messages"
