"""Proof, by rendering, that every part of a conversation reaches the text.

A chat template may leave out a role, the tools, or the second of two calls, without an error. To look for the part's
words in the text proves nothing, because an answer may repeat them ("What is the weather in Paris?" beside a tool named
`weather`). So the conversation is rendered once more with a marker in place of each part, a word that occurs nowhere
else, and each marker must be in that text.

What a template writes depends on the shape of a conversation (roles, keys, number of calls) and rarely on its words, so
that one proof serves all conversations of one shape. Templates whose output depends on the words as well are still held
to the words themselves by the renderer's own check (`sft.data.encoding.chat`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launcher.contract.errors import DataError

Apply = Callable[[list[dict[str, Any]], list[Any] | None], str]
"""Render messages and tools without a generation prompt; DataError where the template refuses them."""

_TOOL_TEXTS = ("name", "description")


@dataclass(frozen=True, slots=True)
class Part:
    """Something that a row says, and the marker that stands for it."""

    turn: int | None
    """Index of the message; None for the tools."""
    what: str
    marker: str


class WrittenParts:
    """Which parts of conversations a template leaves out; remembers the answer for each shape."""

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._known: dict[object, tuple[Part, ...]] = {}

    def left_out(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> tuple[Part, ...]:
        """Return the parts of these messages and tools that the template does not write, in their order.

        Contents of assistant turns with calls and reasoning are not among them: templates drop both from turns that
        others follow, and the renderer holds the turns that are trained to them one by one.
        """
        shape = _shape([list(messages), list(tools or [])])
        if shape not in self._known:
            self._known[shape] = self._prove(messages, tools)
        return self._known[shape]

    def _prove(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Any] | None) -> tuple[Part, ...]:
        marking = _Marking()
        marked_messages = [marking.message(turn, message) for turn, message in enumerate(messages)]
        marked_tools = [marking.tool(tool) for tool in tools or ()] or None
        try:
            text = self._apply(marked_messages, marked_tools)
        except DataError:
            return ()  # a template that checks the words themselves: only they can be looked for
        return tuple(part for part in marking.parts if part.marker not in text)


class _Marking:
    """Puts markers in the place of parts, and keeps which stands for what."""

    def __init__(self) -> None:
        self.parts: list[Part] = []
        self._numbers = itertools.count()

    def message(self, turn: int, message: Mapping[str, Any]) -> dict[str, Any]:
        marked = dict(message)
        calls = message.get("tool_calls", ())
        if message["content"]:
            marker = self._marker()
            marked["content"] = marker
            if not calls:
                self.parts.append(Part(turn, "content", marker))
        if calls:
            marked["tool_calls"] = [self._call(turn, call) for call in calls]
        return marked

    def tool(self, tool: Mapping[str, Any]) -> dict[str, Any]:
        """Mark what a tool and its parameters are called and what is said of them."""
        function = dict(tool.get("function", tool))
        for key in _TOOL_TEXTS:
            if isinstance(function.get(key), str) and function[key].strip():
                function[key] = self._new(None, f"tool {key}")
        return {**tool, "function": function} if "function" in tool else function

    def _call(self, turn: int, call: Mapping[str, Any]) -> dict[str, Any]:
        function = call["function"]
        marked = {"name": self._new(turn, "tool call"), "arguments": self._arguments(turn, function["arguments"])}
        return {**call, "function": {**function, **marked}}

    def _arguments(self, turn: int, value: Any) -> Any:
        """Mark the texts of a call's arguments; numbers, truth values and names of arguments stay."""
        if isinstance(value, str):
            return self._new(turn, "tool call's arguments") if value.strip() else value
        if isinstance(value, Mapping):
            return {name: self._arguments(turn, item) for name, item in value.items()}
        return [self._arguments(turn, item) for item in value] if isinstance(value, list) else value

    def _new(self, turn: int | None, what: str) -> str:
        marker = self._marker()
        self.parts.append(Part(turn, what, marker))
        return marker

    def _marker(self) -> str:
        # Letters and digits only, so that no filter (tojson, trim, capitalize of the first letter) changes it.
        return f"zq{next(self._numbers):06d}xk"


def _shape(value: Any, key: str = "") -> object:
    """What of a conversation decides which parts are written: everything but its words."""
    if isinstance(value, str):
        return value if key == "role" else bool(value.strip())
    if isinstance(value, Mapping):
        return tuple((name, _shape(item, name)) for name, item in value.items())
    if isinstance(value, list):
        return tuple(_shape(item, key) for item in value)
    return type(value)


def describe(parts: Sequence[Part], messages: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say of each turn, and of the tools, what the template leaves out."""
    for turn, group in itertools.groupby(parts, key=lambda part: part.turn):
        names = ", ".join(dict.fromkeys(part.what for part in group))
        if turn is None:
            yield f"the chat template does not write the tools ({names}); name one that does in data.chat_template"
        else:
            yield f"message {turn + 1} ({messages[turn]['role']}): the chat template does not write its {names}"
