"""Conversations -> rendered texts, and which characters of them are trained.

A turn is what rendering it adds to the prompt that generation would begin with, its terminator included. A text
serves a turn only if it begins with exactly that: the prompt, and the turn as it is when it is the last. Templates
that write a turn differently once others follow it (dropping `<think>`, say) fail this. With data.on_mismatch
`error` they are refused with the turn's name; with `split` such a turn gets a text of its own, so that each turn is
trained behind the prompt that generation would give it. Turns that can share a text do.

Templates may close a whole conversation with an end token of its own: it is no part of a turn that others follow.
Templates may leave the end of a turn to the header of the next one: then that header's first token ends it, and is
trained.

Rejected: `{% generation %}` marks (few templates have them); looking for the answer's text in the whole (it may
occur twice); taking what two renderings have in common (off by a turn without any sign of it).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
import yaml
from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.escape import ControlTokens
from sft.data.encoding.written import WrittenParts, describe
from sft.data.reading.formats import Example
from sft.data.reading.messages import Message

Span = tuple[int, int, float]
"""First character, the one after the last, and the loss weight."""

_RESERVED = ("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_SPLIT_HINT = "; a mask would be wrong, and data.on_mismatch split trains each such turn behind a prompt of its own"


class Rewritten(DataError):
    """A turn is written differently once others follow it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text to tokenize. Control tokens in content are hidden, and spans count hidden characters."""

    text: str
    spans: tuple[Span, ...]
    """Later ones win where they overlap."""
    unused: int = 0
    """Messages after the last trained one, which are left out."""


class ChatRenderer:
    """Renders conversations with one template and loss policy."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: str, controls: ControlTokens, spec: DataSpec
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._controls = controls
        self._spec = spec
        self._variables = {name: _variable(name, value) for name, value in spec.chat_template_kwargs.items()}
        self.written = WrittenParts(lambda messages, tools: self.apply(messages, tools, False))
        self.wants_parts = False
        self.wants_parts = self._wants_parts()

    def render(self, example: Example) -> list[Rendered]:
        """The texts of a conversation: one, or several where the template rewrites turns and may be split."""
        conversation = _Conversation(self, example)
        weights = self._weights(example.messages)
        if self._spec.loss_on == "all":
            return [conversation.everything(weights)]
        trained = {turn: weight for turn, weight in enumerate(weights) if weight}
        if not trained:
            return [Rendered(conversation.answered(len(example.messages) - 1), ())]
        return conversation.split(trained, may_split=self._spec.on_mismatch == "split")

    def turn_ends(self, example: Example, text: str) -> list[tuple[str, int]]:
        """Role of each turn that `text`, one of the example's, holds, and where it ends; for people to look at."""
        conversation = _Conversation(self, example)
        found: list[tuple[str, int]] = []
        for turn, message in enumerate(example.messages):
            try:
                written = conversation.answered(turn)
            except DataError:  # a template may refuse to end there
                continue
            end = len(os.path.commonprefix([written, text]))  # noqa: RUF071 (characters are what is compared)
            if end > (found[-1][1] if found else 0):
                found.append((message.role, end))
        return found

    def apply(self, messages: list[dict[str, Any]], tools: list[Any] | None, generation_prompt: bool) -> str:
        """The template's text; DataError where it refuses."""
        if self.wants_parts:
            messages = [_with_parts(message) for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self._variables,
            )
        # Templates are programs: besides their own errors they raise what their filters and operators raise.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
            raise DataError(f"the chat template refuses the first {len(messages)} messages: {error}") from error
        return str(text)

    def _wants_parts(self) -> bool:
        """Return whether the template writes content only where it is a list of parts, as those of vision models do."""
        marker = "zqcontentxk"
        forms = (marker, [{"type": "text", "text": marker}])
        for wants_parts, content in enumerate(forms):
            with contextlib.suppress(DataError):
                text = self.apply([{"role": "user", "content": content}], None, False)
                as_code = re.search(r"""["']type["']""", text)  # the list itself, as Python or JSON writes it
                if marker in text and not as_code:
                    return bool(wants_parts)
        return False

    @property
    def controls(self) -> ControlTokens:
        """The control tokens that are hidden in content."""
        return self._controls

    def _weights(self, messages: Sequence[Message]) -> list[float | None]:
        """Loss weight of each turn; with loss_on all None where the row says nothing."""
        if self._spec.loss_on == "all":
            return [message.weight for message in messages]
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        chosen = set(answers[-1:] if self._spec.loss_on == "last_assistant" else answers)
        found: list[float | None] = []
        for turn, message in enumerate(messages):
            asked = message.role != "assistant" and message.weight is not None
            default = 1.0 if message.weight is None else message.weight
            found.append(default if turn in chosen or asked else 0.0)
        return found


class _Conversation:
    """One conversation and its renderings, each made once."""

    def __init__(self, renderer: ChatRenderer, example: Example) -> None:
        self._renderer = renderer
        self._controls = renderer.controls
        self._messages = [self._controls.hide_in(message.for_template()) for message in example.messages]
        self._tools = [self._controls.hide_in(tool) for tool in example.tools] or None
        self._known: dict[tuple[int, bool], str] = {}

    def everything(self, weights: Sequence[float | None]) -> Rendered:
        """The whole as one text that is trained but for the turns whose weight says otherwise."""
        text = self.answered(len(self._messages) - 1)
        self._require_written(len(self._messages), text)
        asked = [
            (*self._locate(turn, text), weight) for turn, weight in enumerate(weights) if weight not in (None, 1.0)
        ]
        return Rendered(text, ((0, len(text), 1.0), *((a, b, float(w or 0.0)) for a, b, w in asked)))

    def split(self, trained: Mapping[int, float], *, may_split: bool) -> list[Rendered]:
        """Texts in which each of the `trained` turns is once, behind the prompt of generation."""
        left, found = sorted(trained), list[Rendered]()
        while left:
            last, rest = left[-1], list[int]()
            text = self.answered(last) + self._closing(last)
            spans: list[Span] = []
            for turn in left:
                try:
                    spans.append((*self._locate(turn, text), trained[turn]))
                except Rewritten:
                    if not may_split:
                        raise
                    rest.append(turn)
            self._require_written(last + 1, text)
            unused = 0 if found else len(self._messages) - last - 1
            found.append(Rendered(text, tuple(spans), unused))
            left = rest
        return found[::-1]

    def answered(self, turn: int) -> str:
        """The conversation up to and with `turn`."""
        return self._render(turn + 1, False)

    def _locate(self, turn: int, text: str) -> tuple[int, int]:
        """First and last character of a turn in `text`, which must hold it as generation would have."""
        name = f"message {turn + 1} ({self._messages[turn]['role']})"
        is_answer = self._messages[turn]["role"] == "assistant"
        if turn == 0 and is_answer:
            raise DataError(f"{name}: nothing comes before it, so there is no prompt it could answer")
        prompt = self._render(turn, True) if is_answer else self._context(turn, text)
        answered = self.answered(turn)
        if not answered.startswith(prompt):
            said = self._difference(f"{name}: the chat template does not go on from", prompt, answered)
            raise DataError(f"{said}; see data.chat_template_kwargs, or name another data.chat_template")
        end = self._end(len(prompt), answered, text)
        if end is None:
            said = self._difference(f"{name}: the chat template rewrites, once turns follow,", answered, text)
            raise Rewritten(said + _SPLIT_HINT)
        self._require_answer(turn, text[len(prompt) : end], name)
        if is_answer:
            return len(prompt), end
        # Nobody generates the header of such a turn, nor what a template puts in front of the first one: it begins
        # where what it says is written, which is the last thing before the end token.
        said = (self._messages[turn]["content"] or "").strip()
        return max(text.rfind(said, len(prompt), self._controls.trailing(text[:end])[-1]), len(prompt)), end

    def _context(self, turn: int, text: str) -> str:
        """What is in front of a turn that is no answer."""
        before = self._render(turn, False) if turn else ""
        cuts = self._controls.trailing(before)
        return next((before[:cut] for cut in cuts if text.startswith(before[:cut])), before)

    def _end(self, begin: int, answered: str, text: str) -> int | None:
        """Where the turn that `answered` ends with ends in `text`; None where it is written differently there."""
        terminated = self._controls.ends_with_control(answered[begin:])
        for cut in self._controls.trailing(answered):
            if cut <= begin or (terminated and not self._controls.ends_with_control(answered[begin:cut])):
                return None
            if text.startswith(answered[:cut]):
                return cut if terminated else cut + self._controls.leading(text[cut:])
        return None

    def _closing(self, turn: int) -> str:
        """What ends a turn that the template leaves to the next header to end; usually nothing."""
        message = self._messages[turn]
        if message["role"] != "assistant" or self._controls.ends_with_control(self.answered(turn)):
            return ""
        # Asked of a plain conversation: in this one, a turn that follows may change what was written before.
        calls = {"tool_calls": message["tool_calls"]} if "tool_calls" in message else {}
        plain = [{"role": "user", "content": "."}, {"role": "assistant", "content": ".", **calls}]
        try:
            answered = self._apply(plain, False)
            probe = self._apply([*plain, {"role": "tool" if calls else "user", "content": "."}], False)
        except DataError:
            return ""
        follows = probe[len(answered) :] if probe.startswith(answered) else ""
        return follows[: self._controls.leading(follows)]

    def _render(self, count: int, generation_prompt: bool) -> str:
        key = (count, generation_prompt)
        if key not in self._known:
            self._known[key] = self._apply(self._messages[:count], generation_prompt)
        return self._known[key]

    def _apply(self, messages: list[dict[str, Any]], generation_prompt: bool) -> str:
        return self._renderer.apply(messages, self._tools, generation_prompt)

    def _require_answer(self, turn: int, said: str, name: str) -> None:
        """A template that leaves out what an answer says would train another answer."""
        message = self._messages[turn]
        parts = [("content", message["content"])] if message["content"] else []
        parts += [(key, message[key]) for key in _REASONING if key in message]
        parts += [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls", ())]
        missing = [key for key, part in parts if not _holds(said, part)]
        if missing:
            raise DataError(f"{name}: the chat template does not write its {', '.join(dict.fromkeys(missing))}")

    def _require_written(self, count: int, text: str) -> None:
        """A template that leaves out what is asked would train answers to questions that nobody saw."""
        messages = self._messages[:count]
        left_out = self._renderer.written.left_out(messages, self._tools)
        if left_out:
            raise DataError(list(describe(left_out, messages)))
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" and message["content"] and not _holds(text, message["content"]):
                raise DataError(f"message {turn + 1} ({message['role']}): the chat template does not write its content")

    def _difference(self, what: str, expected: str, found: str) -> str:
        expected, found = self._controls.reveal(expected), self._controls.reveal(found)
        at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
        before, after = expected[max(0, at - 20) : at + 20], found[max(0, at - 20) : at + 20]
        return f"{what} {before!r}: it becomes {after!r}"


def _variable(name: str, text: str) -> Any:
    """The value of a template variable. What YAML makes a date of stays the text it is."""
    if name in _RESERVED:
        raise DataError(f"data.chat_template_kwargs: {name} is set by the rows and by what is asked of the template")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"data.chat_template_kwargs.{name}: {text!r} is not valid YAML") from None
    return text if isinstance(value, datetime.date) else value


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """Return the message with its content as a list of parts."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


def _holds(text: str, part: str) -> bool:
    """Whether `text` holds `part`, give or take spaces and tags that a template sets, and JSON's quoting."""
    if part in text:
        return True
    letters = _letters(text)
    return _letters(part) in letters or _letters(json.dumps(part, ensure_ascii=False)) in letters


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)
