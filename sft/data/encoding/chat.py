"""Render conversations as texts, and find which characters of them are trained.

A turn is what rendering it adds to the prompt of generation (the conversation so far, rendered with the generation
prompt), its end token included. A text may train a turn only if it begins with exactly that prompt and the turn as it
is rendered when it is the last. Templates that rewrite a turn once others follow (dropping `<think>`, say) fail this:

* data.on_mismatch `error`: DataError with the turn.
* data.on_mismatch `split`: such a turn gets a text of its own, in which it is the last. So each turn is trained after
  the prompt that generation would give it. Turns that can share a text do.

Two things that templates do at the end of a turn:

* An end token may close the whole conversation. It is no part of a turn that others follow.
* The end of a turn may be the header of the next one. The first token of that header then ends the turn and is trained.

Rejected: `{% generation %}` marks (few templates have them), searching for the answer's text in the whole (it may occur
twice), and taking what two renderings have in common (silently off by a turn).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import yaml

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.encoding.escape import ControlTokens
from sft.data.encoding.long_chat import LONG, Place, chained_places
from sft.data.encoding.template_reads import TemplateReads
from sft.data.encoding.tokenizer import ChatTemplates
from sft.data.encoding.written import WrittenParts, describe, shape_of
from sft.data.reading.formats import Example
from sft.data.reading.messages import Message, TemplateMessage, Tool
from sft.data.reading.row import REASONING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int, float]
"""First character, the one after the last, and the loss weight."""

_SET = ("messages", "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt")
_ARGUMENTS = (
    *("continue_final_message", "sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors"),
    *("return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs"),
)
"""What transformers takes for arguments of its own, and not for variables of the template."""

_LONGEST_END = 64
"""Characters in which the end token behind a content is looked for."""
_SPLIT_HINT = "; the mask would be wrong. data.on_mismatch split trains each such turn in a text of its own"


class Rewritten(DataError):
    """The template writes a turn differently once others follow it."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """One text to tokenize, with placeholders for control tokens in content (sft/data/encoding/escape.py)."""

    text: str
    spans: tuple[Span, ...]
    """What is trained, in characters of `text`. Where spans overlap, the later one counts."""
    unused: int = 0
    """Messages after the last trained one, which are left out."""


class ChatRenderer:
    """Renders conversations with one template and loss policy."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, templates: ChatTemplates, controls: ControlTokens, spec: DataSpec
    ) -> None:
        self._tokenizer = tokenizer
        self._templates = {tools: _dated(templates.of(tools), spec.now) for tools in (False, True)}
        self._controls = controls
        self._spec = spec
        self._variables = {name: _variable(name, value) for name, value in spec.chat_template_kwargs.items()}
        self.reads = TemplateReads(self._templates.values())
        self.reads.check_given(self._variables)
        self.written = WrittenParts(lambda messages, tools: self.apply(messages, tools, False))
        self._wants_parts = {tools: self._takes_parts_only(template) for tools, template in self._templates.items()}

    def render(self, example: Example) -> list[Rendered]:
        """Return the texts of a conversation: one, or several where the template rewrites turns.

        Raise DataError for a conversation that the template cannot write, or rewrites with data.on_mismatch error.
        """
        conversation = _Conversation(self, example)
        weights = self._weights(example.messages)
        if self._spec.loss_on == "all":
            return [conversation.everything(weights)]
        trained = {turn: weight for turn, weight in enumerate(weights) if weight}
        if not trained:  # counted as a row without targets later
            return [Rendered(conversation.answered(len(example.messages) - 1), ())]
        return conversation.split(trained, may_split=self._spec.on_mismatch == "split")

    def prompt(self, turns: Sequence[Message], tools: Sequence[Tool]) -> str:
        """Return the text after which the model answers `turns`, or raise DataError if a part of them is left out."""
        conversation = _Conversation(self, Example(where="", messages=tuple(turns), tools=tuple(tools)))
        return conversation.prompt()

    def drops_names(self, example: Example) -> bool:
        """Return whether the template leaves out the name of a turn, which most do: it is told, and not refused."""
        if not any(message.extra.get("name") for message in example.messages):
            return False
        messages = [self._controls.hide_in(message.for_template()) for message in example.messages]
        return self.written.drops_names(messages, [self._controls.hide_in(tool) for tool in example.tools] or None)

    def turn_ends(self, example: Example, text: str) -> list[tuple[str, int]]:
        """Return the role of each turn in `text`, one of the example's, and where it ends. For reports, not for masks.

        Two renderings are compared only as far as they agree, so a turn that is rewritten ends early.
        """
        if len(example.messages) > LONG:
            return self._content_ends(example, text)
        conversation = _Conversation(self, example)
        ends: list[tuple[str, int]] = []
        for turn, message in enumerate(example.messages):
            try:
                written = conversation.answered(turn)
            except DataError:  # a template may refuse to end there
                continue
            end = len(os.path.commonprefix([written, text]))  # noqa: RUF071 (characters are what is compared)
            if end > (ends[-1][1] if ends else 0):
                ends.append((message.role, end))
        return ends

    def _content_ends(self, example: Example, text: str) -> list[tuple[str, int]]:
        """Return what `turn_ends` does for a long conversation, by where contents are, each with its end token."""
        ends: list[tuple[str, int]] = []
        at = 0
        for message in example.messages:
            content = self._controls.hide(message.content or "").strip()
            found = text.find(content, at)
            if content and found >= 0:
                at = found + len(content)
                at += self._controls.leading(text[at : at + _LONGEST_END])
                ends.append((message.role, at))
        return ends

    def apply(
        self, messages: Sequence[Mapping[str, object]], tools: Sequence[Tool] | None, generation_prompt: bool
    ) -> str:
        """Return the text that the template writes, or raise DataError if it refuses the messages."""
        if self._wants_parts[bool(tools)]:
            messages = [_with_parts(message) for message in messages]
        return self._apply(self._templates[bool(tools)], messages, tools, generation_prompt)

    def _apply(
        self,
        template: str,
        messages: Sequence[Mapping[str, object]],
        tools: Sequence[Tool] | None,
        generation_prompt: bool,
    ) -> str:
        # transformers' annotations allow only texts as content, where templates also take lists and None.
        arguments: dict[str, Any] = {"conversation": messages, "tools": tools, **self._variables}
        try:
            text = self._tokenizer.apply_chat_template(
                chat_template=template, tokenize=False, add_generation_prompt=generation_prompt, **arguments
            )
        # Templates are programs: besides jinja2's errors they raise those of their filters and operators.
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise DataError(f"the chat template refuses the first {len(messages)} messages: {error}") from error
        except RecursionError:
            raise DataError(f"the chat template calls itself too often on the first {len(messages)} messages") from None
        return str(text)

    def _takes_parts_only(self, template: str) -> bool:
        """Return whether a template writes content only where it is a list of parts, as those of vision models do."""
        marker = "zqcontentxk"
        forms = (marker, [{"type": "text", "text": marker}])
        for wants_parts, content in enumerate(forms):
            with contextlib.suppress(DataError):
                text = self._apply(template, [{"role": "user", "content": content}], None, False)
                as_code = re.search(r"""["']type["']""", text)  # the list itself, as Python or JSON writes it
                if marker in text and not as_code:
                    return bool(wants_parts)
        return False

    @property
    def controls(self) -> ControlTokens:
        """What hides control tokens in content."""
        return self._controls

    def _weights(self, messages: Sequence[Message]) -> list[float | None]:
        """Return the loss weight of each turn. With loss_on all, None for a turn whose row gives none."""
        if self._spec.loss_on == "all":
            return [None if message.is_context else message.weight for message in messages]
        answers = [turn for turn, message in enumerate(messages) if message.role == "assistant"]
        chosen = set(answers[-1:] if self._spec.loss_on == "last_assistant" else answers)
        weights: list[float | None] = []
        for turn, message in enumerate(messages):
            # A row may ask for turns of other roles too, but among answers only for those that loss_on chooses.
            asked = message.role != "assistant" and message.train
            default = 1.0 if message.weight is None else message.weight
            weights.append(default if turn in chosen or asked else 0.0)
        return weights


class _Conversation:
    """One conversation and its renderings, each of which is made once."""

    def __init__(self, renderer: ChatRenderer, example: Example) -> None:
        self._renderer = renderer
        self._controls = renderer.controls
        self._spelled = [message.for_template() for message in example.messages], list(example.tools)
        self._messages = [self._controls.hide_in(message) for message in self._spelled[0]]
        self._tools = [self._controls.hide_in(tool) for tool in self._spelled[1]] or None
        self._known: dict[tuple[int, bool], str] = {}

    def everything(self, weights: Sequence[float | None]) -> Rendered:
        """Return the whole conversation as one text, trained except for the turns that have another weight."""
        text = self.answered(len(self._messages) - 1)
        self._require_written(len(self._messages), text)
        answers = [turn for turn, message in enumerate(self._messages) if message["role"] == "assistant"]
        self._require_said(len(self._messages), answers)
        asked = [
            (*self._locate(turn, text), weight) for turn, weight in enumerate(weights) if weight not in (None, 1.0)
        ]
        return Rendered(text, ((0, len(text), 1.0), *((a, b, float(w or 0.0)) for a, b, w in asked)))

    def split(self, trained: Mapping[int, float], *, may_split: bool) -> list[Rendered]:
        """Return texts that train each of the turns in `trained` (turn to weight) once, after the generation's prompt.

        Raise Rewritten if one text cannot train all of them, unless `may_split` is set.
        """
        left, texts = sorted(trained), list[Rendered]()
        self._require_context(left)
        # From the end: the text that ends with the last turn left always trains that one, so each round has fewer.
        while left:
            last, rest = left[-1], list[int]()
            text = self.answered(last) + self._closing(last)
            known = self._located_at_once(left, text)
            spans: list[Span] = []
            for turn in left:
                try:
                    place = known.get(turn) or self._locate(turn, text)
                    spans.append((*place, trained[turn]))
                except Rewritten:
                    if not may_split:
                        raise
                    rest.append(turn)
            self._require_written(last + 1, text)
            unused = 0 if texts else len(self._messages) - last - 1
            texts.append(Rendered(text, tuple(spans), unused))
            left = rest
        return texts[::-1]

    def _located_at_once(self, turns: Sequence[int], text: str) -> Mapping[int, Place]:
        """Return where the turns of a long conversation are in `text`, nothing if each is to be located by itself."""
        if len(turns) < LONG or any(self._messages[turn]["role"] != "assistant" for turn in turns):
            return {}
        try:
            places = chained_places(
                self._messages, turns, text, locate=self._locate, render=self._apply, end_of=self._end
            )
        except Rewritten:
            return {}
        for turn, (begin, end) in (places or {}).items():
            self._require_answer(turn, text[begin:end], self._name(turn))
            # One proof for all answers of a shape: each is written as it is behind the few messages before it.
            self._require_said(turn + 1, [turn], shape_of([self._messages[turn], self._tools]))
        return places or {}

    def prompt(self) -> str:
        """Return the whole conversation and the generation prompt."""
        text = self._render(len(self._messages), True)
        self._require_written(len(self._messages), text)
        return text

    def answered(self, turn: int) -> str:
        """Return the conversation rendered up to and including `turn`."""
        return self._render(turn + 1, False)

    def _locate(self, turn: int, text: str) -> tuple[int, int]:
        """Return where a turn begins and ends in `text`.

        Raise Rewritten if `text` does not hold the turn as it is when it is the last, DataError if the template does
        not write it after the prompt, or leaves out a part of it.
        """
        name = self._name(turn)
        is_answer = self._messages[turn]["role"] == "assistant"
        if turn == 0 and is_answer:
            raise DataError(f"{name}: an answer cannot come first; put the message that it answers before it")
        prompt = self._render(turn, True) if is_answer else self._context(turn, text)
        answered = self.answered(turn)
        if not answered.startswith(prompt):
            changed = self._difference(f"{name}: the chat template does not go on from", prompt, answered)
            raise DataError(f"{changed}; see data.chat_template_kwargs, or name another data.chat_template")
        if answered == prompt:
            raise DataError(f"{name}: the chat template writes nothing for it, so there is nothing to train")
        end = self._end(len(prompt), answered, text)
        if end is None:
            changed = self._difference(f"{name}: the chat template rewrites, once turns follow,", answered, text)
            raise Rewritten(changed + _SPLIT_HINT)
        self._require_answer(turn, text[len(prompt) : end], name)
        if is_answer:
            self._require_said(turn + 1, [turn])
            return len(prompt), end
        # The header of another role's turn is not generated, nor is what a template writes before the first turn. Such
        # a turn is trained from its content on, which is the last thing before its end token.
        content = (self._messages[turn]["content"] or "").strip()
        begin = text.rfind(content, len(prompt), self._controls.trailing(text[:end])[-1])
        if begin < 0:
            raise DataError(f"{name}: the chat template changes its content, so that it cannot be trained on its own")
        return begin, end

    def _name(self, turn: int) -> str:
        return f"message {turn + 1} ({self._messages[turn]['role']})"

    def _context(self, turn: int, text: str) -> str:
        """Return what is before a turn that is no answer, as it is in `text`."""
        before = self._render(turn, False) if turn else ""
        # `text` goes on, so an end token that closes the conversation in `before` may be absent from it.
        cuts = self._controls.trailing(before)
        return next((before[:cut] for cut in cuts if text.startswith(before[:cut])), before)

    def _end(self, begin: int, answered: str, text: str) -> int | None:
        """Return where the last turn of `answered`, which begins at `begin`, ends in `text`.

        None if `text` holds it differently.
        """
        terminated = self._controls.ends_with_control(answered[begin:])
        # Without the control tokens at its end, one after the other: those that close the whole conversation are absent
        # where turns follow. The turn's own end token, if it has one, must stay.
        for cut in self._controls.trailing(answered):
            if cut <= begin or (terminated and not self._controls.ends_with_control(answered[begin:cut])):
                return None
            if text.startswith(answered[:cut]):
                # A turn without an end token of its own is ended by the first token of the next header.
                return cut if terminated else cut + self._controls.leading(text[cut:])
        return None

    def _closing(self, turn: int) -> str:
        """Return the control token that ends `turn` if the template leaves that to the next header, else nothing."""
        message = self._messages[turn]
        if message["role"] != "assistant" or self._controls.ends_with_control(self.answered(turn)):
            return ""
        # Found with a plain conversation: here a turn that follows could change what was written before.
        has_calls = "tool_calls" in message
        answer: TemplateMessage = {"role": "assistant", "content": "."}
        if has_calls:
            answer["tool_calls"] = message["tool_calls"]
        plain: list[TemplateMessage] = [{"role": "user", "content": "."}, answer]
        try:
            answered = self._apply(plain, False)
            probe = self._apply([*plain, {"role": "tool" if has_calls else "user", "content": "."}], False)
        except DataError:  # a template may refuse such a conversation
            return ""
        follows = probe[len(answered) :] if probe.startswith(answered) else ""
        return follows[: self._controls.leading(follows)]

    def _render(self, count: int, generation_prompt: bool) -> str:
        key = (count, generation_prompt)
        if key not in self._known:
            self._known[key] = self._apply(self._messages[:count], generation_prompt)
        return self._known[key]

    def _apply(self, messages: list[TemplateMessage], generation_prompt: bool) -> str:
        return self._renderer.apply(messages, self._tools, generation_prompt)

    def _require_answer(self, turn: int, said: str, name: str) -> None:
        """Raise DataError if the template left out a part of an answer: another answer would be trained."""
        message = self._messages[turn]
        parts: list[tuple[str, str]] = [("content", message["content"])] if message["content"] else []
        parts += [(key, message[key]) for key in REASONING if key in message]
        parts += [("tool_calls", call["function"]["name"]) for call in message.get("tool_calls", ())]
        missing = [key for key, part in parts if not _holds(said, part)]
        if missing:
            raise DataError(f"{name}: the chat template does not write its {', '.join(dict.fromkeys(missing))}")

    def _require_context(self, trained: Sequence[int]) -> None:
        """Raise DataError for an answer before a trained turn of which a part is not written even where it is last."""
        is_long = len(self._messages) > LONG
        for turn, message in enumerate(self._messages[: trained[-1]]):
            if message["role"] == "assistant" and turn not in trained:
                self._require_said(turn + 1, [turn], shape_of([message, self._tools]) if is_long else None)

    def _require_said(self, count: int, turns: Sequence[int], shape: object = None) -> None:
        """Raise DataError if the first `count` messages are written without reasoning or content of these answers."""
        unsaid = self._renderer.written.unsaid(self._messages[:count], self._tools, turns, shape)
        if unsaid:
            raise DataError(list(describe(unsaid, self._messages)))

    def _require_written(self, count: int, text: str) -> None:
        """Raise DataError if the template left out a part of the first `count` messages or of the tools.

        Answers would be trained without what they answer.
        """
        if self._controls.hides_in(text):
            self._require_plain(count)
        messages = self._messages[:count]
        left_out = self._renderer.written.left_out(messages, self._tools)
        if left_out:
            raise DataError(list(describe(left_out, messages)))
        for turn, message in enumerate(messages):
            if message["role"] != "assistant" and message["content"] and not _holds(text, message["content"]):
                raise DataError(f"message {turn + 1} ({message['role']}): the chat template does not write its content")

    def _require_plain(self, count: int) -> None:
        """Raise DataError if the template takes special tokens that content spells for marks, and not for text.

        It may refuse them, or take reasoning out between them. Hidden, they would be trained as letters instead.
        """
        messages, tools = self._spelled
        seen = self._renderer.apply(messages[:count], tools or None, False)
        if seen != self._controls.reveal(self._render(count, False)):
            raise DataError(
                "the chat template reads special tokens that the content spells, and here they are text; give "
                "reasoning and calls in keys of their own (reasoning_content, tool_calls)"
            )

    def _difference(self, what: str, expected: str, actual: str) -> str:
        """Return `what` with the places where two texts begin to differ, control tokens spelled out."""
        expected, actual = self._controls.reveal(expected), self._controls.reveal(actual)
        at = next((i for i, (a, b) in enumerate(zip(expected, actual, strict=False)) if a != b), len(actual))
        before, after = expected[max(0, at - 20) : at + 20], actual[max(0, at - 20) : at + 20]
        return f"{what} {before!r}: it becomes {after!r}"


_DATE_CALL = re.compile(r"""\bstrftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")


def _dated(template: str, now: datetime.datetime) -> str:
    """Return the template with the date of `now` in place of its calls for today's date.

    Otherwise the same row would give another text the next day.
    """
    # The calls themselves are replaced, because transformers gives templates its own `strftime_now` and takes no other.
    dated = _DATE_CALL.sub(lambda call: json.dumps(now.strftime(call[1] or call[2] or "")), template)
    if re.search(r"\bstrftime_now\(", dated):
        raise DataError(
            "the chat template computes the format of a date; write the format as a text into strftime_now(...)"
        )
    return dated


def _variable(name: str, text: str) -> object:
    """Return the value of a template variable, read as YAML, or raise DataError."""
    if name in _ARGUMENTS:
        raise DataError(f"data.chat_template_kwargs: {name} is an argument of transformers, and no variable; remove it")
    if name in _SET:
        raise DataError(f"data.chat_template_kwargs: {name} is set for each row; choose another name or remove it")
    try:
        value: object = yaml.safe_load(text)
    except yaml.YAMLError:
        raise DataError(f"data.chat_template_kwargs.{name}: {text!r} is not valid YAML") from None
    return text if isinstance(value, datetime.date) else value  # templates expect dates as texts


def _with_parts(message: Mapping[str, object]) -> Mapping[str, object]:
    """Return the message with its content as a list of parts."""
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}] if content else []}


def _holds(text: str, part: str) -> bool:
    """Return whether `text` holds `part`, apart from spaces, tags and JSON quoting that a template may add."""
    if part in text:
        return True
    letters = _letters(text)
    return _letters(part) in letters or _letters(json.dumps(part, ensure_ascii=False)) in letters


def _letters(text: str) -> str:
    return re.sub(r"[\W_]+", "", text)
