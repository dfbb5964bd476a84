"""Results of tools belong to calls that come before them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from launcher.contract.errors import DataError
from sft.data.reading.formats import Example, parse_row


def parse(row: dict[str, Any], row_format: str = "messages") -> Example:
    return parse_row(json.dumps(row).encode(), "a.jsonl:3", row_format, {})


def test_results_in_another_order_than_their_calls_are_refused() -> None:
    """Templates without ids write each behind the call of another."""
    calls = [{"id": name, "function": {"name": "f", "arguments": {"city": name}}} for name in ("Paris", "Rome")]
    results = [{"role": "tool", "content": f"It rains in {name}.", "tool_call_id": name} for name in ("Paris", "Rome")]
    question = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": calls}]
    assert len(parse({"messages": [*question, *results]}).messages) == 4
    with pytest.raises(DataError, match=r"messages\[1\]: the results of its calls come in another order"):
        parse({"messages": [*question, *results[::-1]]})


def test_a_result_of_a_call_that_is_not_there_is_refused() -> None:
    """It would be read as that of the call at its place, or its id as one that nobody gave."""
    user = {"role": "user", "content": "Rain?"}
    calls: list[dict[str, Any]] = [
        {"role": "assistant", "tool_calls": [{"id": name, "function": {"name": "f", "arguments": {}}}]} for name in "ab"
    ]
    first, second, other = ({"role": "tool", "content": "It does.", "tool_call_id": name} for name in "abx")
    turns = [user, calls[0], first, calls[1]]
    assert len(parse({"messages": [*turns, second, first]}).messages) == 6  # a later word on an earlier call
    with pytest.raises(DataError, match=r"messages\[4\]: tool_call_id 'x' is that of no call .* have 'a', 'b'\. Give"):
        parse({"messages": [*turns, other]})
    with pytest.raises(DataError, match=r"messages\[3\]: tool_call_id 'b' is that of no call .* have 'a'\. Give"):
        parse({"messages": [user, calls[0], first, second, calls[1]]})
    many = {"role": "assistant", "tool_calls": [{**calls[0]["tool_calls"][0], "id": str(n)} for n in range(10)]}
    with pytest.raises(DataError, match="have '2', '3', '4', '5', '6', '7', '8', '9' and 2 earlier ones"):
        parse({"messages": [user, many, other]})


def test_ids_of_results_alone_say_nothing() -> None:
    """Rows in the wild have lost the ids of their calls, hold calls as text, or have an empty id in each turn."""
    user = {"role": "user", "content": "Rain?"}
    call: dict[str, Any] = {"function": {"name": "f", "arguments": {}}}
    result = {"role": "tool", "content": "It does.", "tool_call_id": "x"}
    for asks in ({"tool_calls": [call]}, {"tool_calls": [{**call, "id": ""}]}, {"content": "<tool_call>f</tool_call>"}):
        assert len(parse({"messages": [user, {"role": "assistant", **asks}, result]}).messages) == 3
    with_id = {"role": "assistant", "tool_calls": [{**call, "id": "a"}]}
    assert len(parse({"messages": [user, with_id, {**result, "tool_call_id": ""}]}).messages) == 3


def test_calls_of_a_prompt_have_their_results_in_the_completion() -> None:
    calls = [{"id": name, "function": {"name": "f", "arguments": {}}} for name in "ab"]
    prompt = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": calls}]
    first, second, other = ({"role": "tool", "content": "It does.", "tool_call_id": name} for name in "abx")
    answer = {"role": "assistant", "content": "It does."}
    row = {"prompt": prompt, "completion": [first, second, answer]}
    assert len(parse(row, "prompt_completion").messages) == 5
    with pytest.raises(DataError, match=r"prompt\[1\]: the results of its calls come in another order"):
        parse({**row, "completion": [second, first, answer]}, "prompt_completion")
    with pytest.raises(DataError, match=r"completion\[0\]: tool_call_id 'x' is that of no call before it; these have "):
        parse({**row, "completion": [other, answer]}, "prompt_completion")


def test_results_without_ids_are_compared_with_their_calls_by_name() -> None:
    calls = [{"function": {"name": name, "arguments": {}}} for name in ("sun", "rain", "rain")]
    sun, rain = ({"role": "tool", "content": "It does.", "name": name} for name in ("sun", "rain"))
    question = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": calls[:2]}]
    assert len(parse({"messages": [*question, sun, rain]}).messages) == 4
    with pytest.raises(DataError, match="in another order than the calls, by their tool_call_id or name"):
        parse({"messages": [*question, rain, sun]})
    question[1]["tool_calls"] = calls  # two of one name: which of them a result answers is not known
    assert len(parse({"messages": [*question, rain, rain, sun]}).messages) == 5


@pytest.mark.parametrize("given", [7, 0, 1.5, True, {"a": 1}, ["x"]])
def test_the_id_of_a_call_is_a_text(given: object) -> None:
    """Another one was dropped, and templates that write ids wrote none."""
    call: dict[str, Any] = {"function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [{**call, "id": given}]}]
    with pytest.raises(DataError, match=r"messages\[1\]: tool_calls: the id of the call of 'f' must be a text, found "):
        parse({"messages": turns})
    said = json.dumps({"id": given, "name": "f", "arguments": {}})
    sharegpt = [{"from": "human", "value": "Rain?"}, {"from": "function_call", "value": said}]
    with pytest.raises(DataError, match=r"conversations\[1\]: 'value': the id of the call of 'f' must be a text"):
        parse({"conversations": sharegpt}, "sharegpt")
    assert parse({"messages": [turns[0], {"role": "assistant", "tool_calls": [{**call, "id": None}]}]}).messages


def test_a_call_is_one_of_a_function() -> None:
    """Another type was replaced by that word, which templates may write."""
    call: dict[str, Any] = {"type": "custom", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]}]
    with pytest.raises(DataError, match=r"tool_calls: the call of 'f' is of type 'custom'; only function is read"):
        parse({"messages": turns})
