"""Proof, by rendering, that every part of a conversation reaches the text.

A chat template may leave out a role, the tools, or the second of two calls, without an error. Finding the part's words
in the text proves nothing, because an answer may repeat them ("What is the weather in Paris?" beside a tool named
`weather`). So the conversation is rendered once more with a marker in place of each part, a word that occurs nowhere
else, and each marker must be in that text.

What a template writes depends on the shape of a conversation (roles, keys, number of calls) and rarely on its words, so
one proof serves all conversations of one shape. Where the output depends on the words as well, the renderer still
checks the words themselves (`sft.data.encoding.chat`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from launcher.contract.errors import DataError
from sft.data.reading.messages import Description, TemplateMessage, Tool, ToolCall
from sft.data.reading.row import REASONING

Apply = Callable[[Sequence[TemplateMessage], Sequence[Tool] | None], str]
"""Render messages and tools without a generation prompt, or raise DataError if the template refuses them."""

_TOOL_TEXTS = ("name", "description")
_ARGUMENTS = "tool call's arguments"
_FIRST_NUMBER = 730_916_000
"""From which on numbers stand for those of a row."""


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a row says, and the marker that stands for it."""

    turn: int | None
    """Index of the message; None for the tools."""
    what: str
    marker: str


class WrittenParts:
    """Finds which parts of conversations a template leaves out, and remembers the answer for each shape."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._known: dict[object, tuple[Part, ...]] = {}
        self._drops_names: dict[object, bool] = {}
        self._unsaid: dict[object, tuple[Part, ...]] = {}

    def left_out(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None) -> tuple[Part, ...]:
        """Return the parts of these messages and tools that the template does not write, in their order.

        Reasoning, and the content of assistant turns with calls, are not among them: templates drop both from turns
        that others follow. `unsaid` finds them in turns that are trained.
        """
        shape = shape_of([list(messages), list(tools or [])])
        if shape not in self._known:
            self._known[shape] = self._prove(messages, tools)
        return self._known[shape]

    def unsaid(
        self,
        messages: Sequence[TemplateMessage],
        tools: Sequence[Tool] | None,
        turns: Sequence[int],
        shape: object = None,
    ) -> tuple[Part, ...]:
        """Return reasoning, and content beside calls, of the answers `turns` that the template does not write.

        The answer is that for all conversations of one `shape`, by default the one of these messages and tools.
        """
        open_turns = [turn for turn in turns if _may_be_unsaid(messages[turn])]
        if not open_turns:
            return ()
        key = (shape or shape_of([list(messages), list(tools or [])]), *open_turns)
        if key not in self._unsaid:
            self._unsaid[key] = self._prove_said(messages, tools, open_turns)
        return self._unsaid[key]

    def _prove_said(
        self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None, turns: Sequence[int]
    ) -> tuple[Part, ...]:
        marking = _Marking()
        marked = list(messages)
        for turn in turns:
            marked[turn] = marking.answer(turn, marked[turn])
        text = self._rendered(marked, tools)
        return () if text is None else tuple(part for part in marking.parts if part.marker not in text)

    def drops_names(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None) -> bool:
        """Return whether the template leaves out the name of a message. One that refuses other names reads them.

        The name of a result is none of these where a call has it: it says nothing more.
        """
        called = {call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
        named = [
            turn
            for turn, message in enumerate(messages)
            if message.get("name", "") not in ("", *(called if message["role"] == "tool" else ()))
        ]
        key = (shape_of([list(messages), list(tools or [])]), *named)
        if named and key not in self._drops_names:
            self._drops_names[key] = self._leaves_out_names(messages, tools, named)
        return bool(named) and self._drops_names[key]

    def _leaves_out_names(
        self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None, named: Sequence[int]
    ) -> bool:
        marked = [message.copy() for message in messages]
        for turn in named:
            marked[turn]["name"] = f"zqname{turn:06d}xk"
        text = self._rendered(marked, tools)
        return text is not None and any(marked[turn]["name"] not in text for turn in named)

    def _rendered(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None) -> str | None:
        """Return the text of changed messages, or None if the template refuses them: then they prove nothing."""
        try:
            return self._apply(messages, tools)
        except DataError:
            return None

    def _prove(self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None) -> tuple[Part, ...]:
        marking = _Marking()
        marked_messages = [marking.message(turn, message) for turn, message in enumerate(messages)]
        marked_tools = [marking.tool(tool) for tool in tools or ()] or None
        text = self._rendered(marked_messages, marked_tools)
        if text is None:
            return ()
        left_out = tuple(part for part in marking.parts if part.marker not in text)
        return (*left_out, *self._taken_for_answers(marked_messages, marked_tools, text))

    def _taken_for_answers(
        self, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None, text: str
    ) -> Iterator[Part]:
        """Yield the first turn of each role, not of a user or an assistant, that the template writes as an answer.

        A template that asks for `user` and has an `else` does. One that tells no roles apart writes nothing wrong.
        """
        for role in dict.fromkeys(message["role"] for message in messages):
            if role in ("user", "assistant"):
                continue
            as_answer, as_question = (
                self._in_place_of(role, other, messages, tools) for other in ("assistant", "user")
            )
            if text == as_answer != as_question:
                first = next(turn for turn, message in enumerate(messages) if message["role"] == role)
                yield Part(first, "role: it writes an answer", "")

    def _in_place_of(
        self, role: str, other: str, messages: Sequence[TemplateMessage], tools: Sequence[Tool] | None
    ) -> str | None:
        """Return the text with another role for all turns of a role, None if the template refuses it."""
        changed = [message.copy() for message in messages]
        for message in changed:
            if message["role"] == role:
                message["role"] = other
        return self._rendered(changed, tools)


class _Marking:
    """Puts markers in place of parts, and keeps which marker stands for what."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._numbers = itertools.count()

    def message(self, turn: int, message: TemplateMessage) -> TemplateMessage:
        """Return the message with markers for its content, and for names and arguments of its calls."""
        marked = message.copy()
        calls = message.get("tool_calls", [])
        if message["content"]:
            marker = self._marker()
            marked["content"] = marker
            if not calls:
                self.parts.append(Part(turn, "content", marker))
        if calls:
            marked["tool_calls"] = [self._call(turn, call) for call in calls]
        return marked

    def answer(self, turn: int, message: TemplateMessage) -> TemplateMessage:
        """Return the answer with markers for its content and reasoning, one for each text that is not blank."""
        marked = message.copy()
        if (message["content"] or "").strip():
            marked["content"] = self._new(turn, "content")
        known: dict[str, str] = {}
        for key in REASONING:
            said = message.get(key, "")
            if said.strip():  # some servers write the same reasoning under two keys, of which templates read one
                marked[key] = known[said] = known.get(said) or self._new(turn, key)
        return marked

    def tool(self, tool: Tool) -> Tool:
        """Return the tool with markers for its name, its description and the names of its parameters."""
        function: dict[str, object] = dict(tool["function"])
        for key in _TOOL_TEXTS:
            value = function.get(key)
            if isinstance(value, str) and value.strip():
                function[key] = self._new(None, f"tool {key}")
        parameters = function.get("parameters")
        if isinstance(parameters, Mapping) and isinstance(parameters.get("properties"), Mapping):
            function["parameters"] = self._parameters(parameters, parameters["properties"])
        marked = tool.copy()
        marked["function"] = cast(Description, function)
        return marked

    def _parameters(self, parameters: Mapping[str, object], properties: Mapping[str, object]) -> dict[str, object]:
        """Return the schema of a tool's parameters with markers for their names."""
        names = {name: self._new(None, "tool parameters") for name in properties}
        required = parameters.get("required")
        marked = {**parameters, "properties": {names[name]: value for name, value in properties.items()}}
        if isinstance(required, list):
            marked["required"] = [names.get(name, name) if isinstance(name, str) else name for name in required]
        return marked

    def _call(self, turn: int, call: ToolCall) -> ToolCall:
        function = call["function"].copy()
        function["name"] = self._new(turn, "tool call")
        function["arguments"] = self._arguments(turn, function["arguments"])
        marked = call.copy()
        marked["function"] = function
        return marked

    def _arguments(self, turn: int, values: Mapping[str, object]) -> dict[str, object]:
        return {self._new(turn, _ARGUMENTS): self._argument(turn, item) for item in values.values()}

    def _argument(self, turn: int, value: object) -> object:
        """Return an argument of a call with markers for its names, texts and numbers. Other values stay."""
        if isinstance(value, str):
            return self._new(turn, _ARGUMENTS) if value.strip() else value
        if isinstance(value, Mapping):
            return self._arguments(turn, value)
        if isinstance(value, list):
            return [self._argument(turn, item) for item in value]
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        number = _FIRST_NUMBER + next(self._numbers)
        self.parts.append(Part(turn, _ARGUMENTS, str(number)))
        return number

    def _new(self, turn: int | None, what: str) -> str:
        marker = self._marker()
        self.parts.append(Part(turn, what, marker))
        return marker

    def _marker(self) -> str:
        # Letters and digits only, so that no filter (tojson, trim, capitalize of the first letter) changes it.
        return f"zq{next(self._numbers):06d}xk"


def _may_be_unsaid(message: TemplateMessage) -> bool:
    """Return whether an answer has a part that templates write in some turns and not in others."""
    has_both = "tool_calls" in message and (message["content"] or "").strip()
    return bool(has_both) or any(message.get(key, "").strip() for key in REASONING)


def shape_of(value: object, key: str = "") -> object:
    """Return what decides which parts of a conversation are written: everything but its words."""
    if isinstance(value, str):
        return value if key == "role" else bool(value.strip())
    if isinstance(value, Mapping):
        return tuple((name, shape_of(item, name)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(shape_of(item, key) for item in value)
    return type(value)


def describe(parts: Sequence[Part], messages: Sequence[TemplateMessage]) -> Iterator[str]:
    """Yield a problem for each turn, and for the tools, with what the template leaves out."""
    for turn, group in itertools.groupby(parts, key=lambda part: part.turn):
        names = ", ".join(dict.fromkeys(part.what for part in group))
        if turn is None:
            yield f"the chat template does not write the tools ({names}); name one that does in data.chat_template"
        else:
            yield f"message {turn + 1} ({messages[turn]['role']}): the chat template does not write its {names}"
