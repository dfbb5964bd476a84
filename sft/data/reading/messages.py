"""Turns of a conversation as people write them down -> the messages that chat templates are given.

    messages   [{"role": "assistant", "content": "...", "reasoning_content": "...", "tool_calls": [...], "weight": 1}]
    sharegpt   [{"from": "gpt", "value": "..."}], function calls as JSON text under a role of their own

Tools and tool calls are brought into the one form that templates read: `{"type": "function", "function": {...}}`,
arguments as an object. What no template could be given (images, the old `function_call` key) is refused: a model
would be trained on something the user did not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Optional

from launcher.contract.errors import DataError
from sft.data.reading.row import MISSING, check_texts, find, get_text, kind, loss_weight, names, parse_json, text

MESSAGE_COLUMNS = ("role", "content")
TURN_COLUMNS = ("from", "value")

_PASSED_ON = ("reasoning_content", "reasoning", "thinking", "tool_call_id", "name")
"""Keys of a message that are texts and that templates look for."""

_NOT_READ = ("function_call", "functions", "audio", "images", "videos")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}
_CALL_ROLES = ("function_call", "tool_call")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: Optional[str]
    """None in a turn of tool calls alone."""
    weight: Optional[float] = None
    """Loss weight that the row asks for; None leaves it to data.loss_on."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys for the template: tool calls, reasoning."""

    def for_template(self) -> dict[str, Any]:
        """The message as templates read it."""
        return {"role": self.role, "content": self.content, **self.extra}


def read_messages(value: Any, where: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The turns of a `messages` list."""
    role_key, content_key = (columns.get(name, name) for name in MESSAGE_COLUMNS)
    found = []
    for item, at in _items(value, where, "messages", "role and content"):
        refuse_unread(item, at)
        role = get_text(item, role_key, at)
        extra: dict[str, Any] = {
            name: text(item[name], f"{at}: {name!r}") for name in _PASSED_ON if item.get(name) is not None
        }
        if item.get("tool_calls") not in (None, []):
            extra["tool_calls"] = _tool_calls(item["tool_calls"], f"{at}: tool_calls")
        found.append(Message(role, _content(item, content_key, at, "tool_calls" in extra), _weight(item, at), extra))
    return tuple(found)


def read_sharegpt(value: Any, where: str, columns: Mapping[str, str]) -> tuple[Message, ...]:
    """The turns of a ShareGPT `conversations` list."""
    role_key, value_key = (columns.get(name, name) for name in TURN_COLUMNS)
    found = []
    for item, at in _items(value, where, "turns", "from and value"):
        refuse_unread(item, at)
        role, said = get_text(item, role_key, at), get_text(item, value_key, at)
        if role in _CALL_ROLES:
            calls = _tool_calls(parse_json(said, f"{at}: {value_key!r}"), f"{at}: {value_key!r}")
            found.append(Message("assistant", "", _weight(item, at), {"tool_calls": calls}))
        elif role in _SHAREGPT_ROLES:
            found.append(Message(_SHAREGPT_ROLES[role], said, _weight(item, at)))
        else:
            known = ", ".join([*_SHAREGPT_ROLES, *_CALL_ROLES])
            raise DataError(f"{at}: unknown role {role!r}; known are {known}")
    return tuple(found)


def read_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Tool descriptions: a list, or JSON text of one."""
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where} must be a list of objects, or JSON text of one, found {kind(value)}")
    check_texts(value, where)
    for tool in value:
        if not isinstance(tool.get("function", tool).get("name"), str):
            raise DataError(f"{where}: a tool has no name; found {names(tool.get('function', tool))}")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in value)


def refuse_unread(row: Mapping[str, Any], where: str) -> None:
    """Refuse keys that change what should be trained, and that no template could be given."""
    unread = [key for key in _NOT_READ if row.get(key) not in (None, [], {}, "", "[]")]
    if unread:
        raise DataError(f"{where}: {', '.join(unread)} would be left out of training; remove it from the data")


def _items(value: Any, where: str, what: str, keys: str) -> list[tuple[dict[str, Any], str]]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of {what}, found {kind(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{where}[{index}] must be an object with {keys}, found {kind(item)}")
    return [(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _content(item: Mapping[str, Any], key: str, at: str, has_calls: bool) -> str | None:
    """Return what a turn says; parts of a list are joined as they are."""
    value = find(item, key)
    if has_calls and value in (None, MISSING):
        return None if value is None else ""
    if not isinstance(value, list):
        return get_text(item, key, at)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            found = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind(part)
            raise DataError(f"{at}: {key!r} holds {found}; only parts {{type: text, text: ...}} can be trained on")
    check_texts(value, f"{at}: {key!r}")
    # One text, because most templates would write a list as Python does: [{'type': 'text', ...
    return "".join(part["text"] for part in value)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    calls = value if isinstance(value, list) else [value]
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a call must be an object with name and arguments, found {kind(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = parse_json(arguments, f"{where}: arguments of {function['name']!r}")
        if not isinstance(arguments, dict):
            raise DataError(f"{where}: arguments of {function['name']!r} must be an object, found {kind(arguments)}")
        check_texts([function["name"], arguments], where)
        known = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append({**known, "type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return found


def _weight(item: Mapping[str, Any], at: str) -> float | None:
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{at}: 'train' must be true or false, found {kind(train)}")
    value = None if weight is None else loss_weight(weight, f"{at}: 'weight'")
    if train is False:
        return 0.0
    return 1.0 if train and value is None else value
