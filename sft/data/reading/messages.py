"""Read the turns of a conversation as messages for chat templates.

    messages   [{"role": "assistant", "content": "...", "reasoning_content": "...", "tool_calls": [...], "weight": 1}]
    sharegpt   [{"from": "gpt", "value": "..."}], function calls as JSON text under a role of their own

Tools and tool calls are brought into the form that templates read: `{"type": "function", "function": {...}}`, with
arguments as an object. What templates cannot write (images, the old `function_call` key) is an error: dropping it would
train on something else than the user wrote.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NotRequired, Required, TypedDict, cast

from launcher.contract.errors import DataError
from sft.data.reading.row import (
    MISSING,
    REASONING,
    Row,
    check_texts,
    find,
    get_text,
    kind,
    loss_weight,
    names,
    parse_json,
    text,
)
from sft.data.reading.unread import refuse_in_turn

MESSAGE_COLUMNS = ("role", "content")
TURN_COLUMNS = ("from", "value")

_TEXT_KEYS: tuple[Literal["reasoning_content", "reasoning", "thinking", "tool_call_id", "name"], ...] = (
    *REASONING,
    "tool_call_id",
    "name",
)
"""Keys of a message, all texts, that templates look for beside role and content."""

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
_ONLY_SHAREGPT = ("human", "gpt", "chatgpt", "model", "observation", "function_response", *_CALL_ROLES)


class Call(TypedDict):
    """Name and arguments of a called function."""

    name: str
    arguments: Mapping[str, object]


class ToolCall(TypedDict):
    """A tool call of an assistant's turn."""

    id: NotRequired[str]
    type: str
    function: Call


class Description(TypedDict):
    """A function that a model may call. Further keys are the template's business."""

    name: str


class Tool(TypedDict):
    """An entry of a row's list of tools."""

    type: NotRequired[str]
    function: Description


class Extra(TypedDict, total=False):
    """Keys of a message beside role and content."""

    reasoning_content: str
    reasoning: str
    thinking: str
    tool_call_id: str
    name: str
    tool_calls: list[ToolCall]


class TemplateMessage(Extra, total=False):
    """A message as chat templates read it."""

    role: Required[str]
    content: Required[str | None]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str | None
    """None in a turn that only calls tools."""
    weight: float | None = None
    """Loss weight that the row asks for; None leaves it to data.loss_on."""
    extra: Extra = field(default_factory=Extra)
    train: bool = False
    """Whether the row asks to train this turn, whatever its role."""
    is_context: bool = False
    """Whether it belongs to a prompt, of which nothing is trained but with data.loss_on all."""

    def for_template(self) -> TemplateMessage:
        """Return the message as templates read it."""
        return {"role": self.role, "content": self.content, **self.extra}


def read_messages(
    value: object, where: str, columns: Mapping[str, str], ignored: Collection[str] = ()
) -> tuple[Message, ...]:
    """Return the turns of a `messages` list, or raise DataError."""
    role_key, content_key = (columns.get(name, name) for name in MESSAGE_COLUMNS)
    messages = []
    for item, at in _items(value, where, "messages", "role and content"):
        refuse_in_turn(item, at, ignored)
        role = _role(item, role_key, at)
        extra: Extra = {}
        for name in _TEXT_KEYS:
            if item.get(name) is not None:
                extra[name] = text(item[name], f"{at}: {name!r}")
                if extra[name] and role != "assistant" and name in REASONING:
                    raise DataError(f"{at}: {name!r} of a turn of {role!r}: only an assistant's turn has reasoning")
        if item.get("tool_calls") not in (None, []):
            extra["tool_calls"] = _tool_calls(item["tool_calls"], f"{at}: tool_calls")
        content = _content(item, content_key, at, "tool_calls" in extra)
        messages.append(Message(role, content, _weight(item, at), extra, item.get("train") is True))
    return tuple(messages)


def read_sharegpt(
    value: object, where: str, columns: Mapping[str, str], ignored: Collection[str] = ()
) -> tuple[Message, ...]:
    """Return the turns of a ShareGPT `conversations` list, or raise DataError.

    Turns may have `role` and `content` in place of `from` and `value`, with the roles of either form.
    """
    if not columns.keys() & set(TURN_COLUMNS) and _has_messages(value):
        if not _has_sharegpt_roles(value):
            return read_messages(value, where, columns, ignored)
        columns = {**columns, "from": "role", "value": "content"}
    role_key, value_key = (columns.get(name, name) for name in TURN_COLUMNS)
    messages = []
    for item, at in _items(value, where, "turns", "from and value"):
        refuse_in_turn(item, at, ignored, sharegpt=True)
        role, said = get_text(item, role_key, at), get_text(item, value_key, at)
        if role in _CALL_ROLES:
            calls = _tool_calls(parse_json(said, f"{at}: {value_key!r}"), f"{at}: {value_key!r}")
            messages.append(Message("assistant", "", _weight(item, at), {"tool_calls": calls}))
        elif role in _SHAREGPT_ROLES:
            train = item.get("train") is True
            messages.append(Message(_SHAREGPT_ROLES[role], said, _weight(item, at), train=train))
        else:
            known = ", ".join([*_SHAREGPT_ROLES, *_CALL_ROLES])
            raise DataError(f"{at}: unknown role {role!r}; known are {known}")
    return tuple(messages)


def read_tools(value: object, where: str) -> tuple[Tool, ...]:
    """Return the tools in a list of descriptions or the JSON text of one, or raise DataError."""
    if isinstance(value, str):
        value = parse_json(value, where) if value.strip() else []
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError(f"{where} must be a list of objects, or JSON text of one, found {kind(value)}")
    check_texts(value, where)
    for tool in value:
        function = tool.get("function", tool)
        if not isinstance(function, dict):
            raise DataError(f"{where}: a tool's 'function' must be an object, found {kind(function)}")
        if not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a tool has no name; found {names(function)}")
    return tuple(
        cast(Tool, tool) if "function" in tool else Tool(type="function", function=cast(Description, tool))
        for tool in value
    )


def _has_messages(value: object) -> bool:
    """Return whether the first of a list of turns has role and content."""
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and "from" not in first and "role" in first


def _has_sharegpt_roles(value: object) -> bool:
    """Return whether turns have roles that only ShareGPT knows."""
    turns = [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
    return any(item.get("role") in _ONLY_SHAREGPT for item in turns)


def _items(value: object, where: str, what: str, keys: str) -> list[tuple[Row, str]]:
    """Return the objects of a list, each with its place for errors, or raise DataError."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where} must be a list of {what}, found {kind(value)}")
    for index, item in enumerate(value):
        if not isinstance(item, dict):
            raise DataError(f"{where}[{index}] must be an object with {keys}, found {kind(item)}")
    return [(item, f"{where}[{index}]") for index, item in enumerate(value)]


def _role(item: Row, key: str, at: str) -> str:
    """Return the role of a turn, or raise DataError for another word for one that templates know.

    Turns of an assistant by another name would not be trained, and most templates write any other role as it is.
    """
    role = get_text(item, key, at)
    meant = _SHAREGPT_ROLES.get(role.strip().lower(), role)
    if meant == "assistant" != role:
        raise DataError(f"{at}: the turns of role {role!r} would not be trained; an answer's role is 'assistant'")
    if meant != role and (meant != "tool" or role.strip().lower() == "tool"):  # GLM-4's templates know `observation`
        raise DataError(f"{at}: role {role!r} is none that models know; write {meant!r}")
    return role


def _content(item: Row, key: str, at: str, has_calls: bool) -> str | None:
    """Return the text of a turn, the parts of a list joined as they are."""
    value = find(item, key)
    if has_calls and value in (None, MISSING):  # a turn that only calls tools; templates treat null and "" differently
        return None if value is None else ""
    if not isinstance(value, list):
        return get_text(item, key, at)
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            held = f"a part of type {part['type']!r}" if isinstance(part, dict) and "type" in part else kind(part)
            raise DataError(f"{at}: {key!r} holds {held}; only parts {{type: text, text: ...}} can be trained on")
    check_texts(value, f"{at}: {key!r}")
    # One text, because most templates would write a list as Python does: [{'type': 'text', ...
    return "".join(part["text"] for part in value)


def _tool_calls(value: object, where: str) -> list[ToolCall]:
    """Return the tool calls in a list or a single call, arguments as objects, or raise DataError."""
    calls: list[ToolCall] = []
    for call in value if isinstance(value, list) else [value]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a call must be an object with name and arguments, found {kind(call)}")
        arguments = _arguments(call, function, where)
        check_texts([function["name"], arguments], where)
        if call.get("type") not in (None, "function"):
            raise DataError(
                f"{where}: the call of {function['name']!r} is of type {call['type']!r}; only function is read"
            )
        tool_call = ToolCall(type="function", function={"name": function["name"], "arguments": arguments})
        if call.get("id") is not None:  # templates that write it would write a number in another way than its text
            tool_call["id"] = text(call["id"], f"{where}: the id of the call of {function['name']!r}")
        calls.append(tool_call)
    return calls


def _arguments(call: Row, function: Row, where: str) -> Mapping[str, object]:
    """Return the arguments of a call, or raise DataError where they have another name or form than templates read."""
    name, known = function["name"], ("name", "function", "id", "type", "index")
    if "arguments" not in function:
        others = [key for key, value in {**call, **function}.items() if key not in known and value is not None]
        if others:  # not a call without arguments, which it would be trained as
            raise DataError(f"{where}: the call of {name!r} has no 'arguments' beside its name; found {names(others)}")
    if function.get("content_type") not in (None, "json"):
        raise DataError(f"{where}: content_type {function['content_type']!r} of {name!r} is not read; only json is")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parse_json(arguments, f"{where}: arguments of {name!r}")
    if not isinstance(arguments, dict):
        raise DataError(f"{where}: arguments of {name!r} must be an object, found {kind(arguments)}")
    return arguments


def _weight(item: Row, at: str) -> float | None:
    """Return the loss weight that a turn asks for with `weight` or `train`, None where it has neither."""
    train, weight = item.get("train"), item.get("weight")
    if train is not None and not isinstance(train, bool):
        raise DataError(f"{at}: 'train' must be true or false, found {kind(train)}")
    value = None if weight is None else loss_weight(weight, f"{at}: 'weight'")
    if train is False:
        return 0.0
    return 1.0 if train and value is None else value
