"""Examples -> token ids and the loss weight of each token as a target.

A conversation is rendered once and tokenized once, so that its ids are those of `apply_chat_template`. Which tokens
are trained follows from characters: an assistant turn is what rendering it adds to the prompt that generation would
begin with, its terminator included. Both renderings must be beginnings of the whole one. Templates that write a
turn differently once others follow it (dropping `<think>`, say) fail that, and are refused with the turn's name:
spans that are off by a turn train the wrong thing without any sign of it.

Edges: a plain token is trained if any of its characters are the assistant's; a control token if its first one is.
Tokens that lie across an edge are counted.

A `text`, and prompt and completion with data.chat_template `none`, are taken as they are: special tokens
spelled in them are special tokens, for who writes the wire format by hand means them. In conversations they are text
(sft/data/escape.py).

Rejected: `{% generation %}` masks (few templates have it), searching for the ids of the answer (they depend on what
is in front of it), and tokenizing turn by turn (other ids than generation sees).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2
import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.errors import DataError, ModelError
from launcher.spec import DataSpec
from sft.data.escape import ControlTokens, Tokenized
from sft.data.formats import Example, Message
from sft.data.tokenizer import chat_template, end_of_text, leading_ids

Span = tuple[int, int]
"""First character, and the one after the last."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example's tokens. `weights[i]` is the weight of predicting token i; the first is predicted by nothing."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    straddling: int = 0
    """Trained tokens that lie across the edge of a trained span."""
    escaped: bool = False
    """Whether content spells special tokens."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> Encoded:
    """Ids and loss weights of one example; many are faster through one `Encoder`."""
    return Encoder(tokenizer, spec).encode(example)


class Encoder:
    """Encodes examples with one tokenizer, template and loss policy."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._template: str | None = None
        self._controls: ControlTokens | None = None

    def encode(self, example: Example) -> Encoded:
        """Ids and loss weights of `example`; DataError names its file and line."""
        if example.text is not None:
            ids = self._closed(self._opened(example.text))
            return _weighted(ids, 0)
        if example.completion is not None and self._spec.chat_template == "none":
            return self._joined(example.prompt, example.completion)
        messages = example.messages
        if example.completion is not None:
            messages = (Message("user", example.prompt), Message("assistant", example.completion))
        return self._conversation(messages, example.where)

    def _joined(self, prompt: str, completion: str) -> Encoded:
        prompt_ids = self._opened(prompt)
        completion_ids: list[int] = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        trained_from = 0 if self._spec.loss_on == "all" else len(prompt_ids)
        return _weighted(self._closed(prompt_ids + completion_ids), trained_from)

    def _opened(self, text: str) -> list[int]:
        """Ids of a text's beginning: what the tokenizer puts in front of it is there once."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        leading = leading_ids(self._tokenizer)
        return ids if ids[: len(leading)] == leading else leading + ids

    def _closed(self, ids: list[int]) -> list[int]:
        end = end_of_text(self._tokenizer)
        return ids if ids and ids[-1] == end else [*ids, end]

    def _conversation(self, messages: Sequence[Message], where: str) -> Encoded:
        template, controls = self._chat_parts()
        try:
            hidden = [{"role": controls.hide(m.role), "content": controls.hide(m.content)} for m in messages]
            whole = self._render(template, hidden, False)
            spans = [(0, len(controls.reveal(whole)))]
            if self._spec.loss_on != "all":
                spans = self._assistant_spans(template, controls, hidden, whole)
            tokenized = controls.tokenize(whole)
        except DataError as error:
            raise DataError([f"{where}: {problem}" for problem in error.problems]) from error
        trained = _trained_tokens(tokenized, spans, controls.ids)
        crossing = [trained & (tokenized.begins < edge) & (edge < tokenized.ends) for span in spans for edge in span]
        return Encoded(
            ids=tokenized.ids,
            weights=_without_first(trained.astype(np.float32)),
            straddling=int(np.count_nonzero(np.any(crossing, axis=0))) if crossing else 0,
            escaped=controls.hides_in(whole),
        )

    def _chat_parts(self) -> tuple[str, ControlTokens]:
        if self._template is None or self._controls is None:
            self._template = chat_template(self._tokenizer, self._spec)
            if self._template is None:
                raise ModelError("data.chat_template none joins prompt and completion; messages need a template")
            self._controls = ControlTokens(self._tokenizer)
        return self._template, self._controls

    def _assistant_spans(
        self, template: str, controls: ControlTokens, messages: list[dict[str, str]], whole: str
    ) -> list[Span]:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if self._spec.loss_on == "last_assistant":
            turns = turns[-1:]
        revealed = controls.reveal(whole)
        spans = []
        for turn in turns:
            name = f"message {turn + 1} (assistant)"
            if turn == 0:
                raise DataError(f"{name}: nothing comes before it, so there is no prompt it could answer")
            prompt = controls.reveal(self._render(template, messages[:turn], True))
            answered = controls.reveal(self._render(template, messages[: turn + 1], False))
            if not answered.startswith(prompt):
                raise DataError(_mismatch(f"{name}: the chat template does not go on from", prompt, answered))
            if not revealed.startswith(answered):
                raise DataError(
                    _mismatch(f"{name}: the chat template rewrites, once turns follow,", answered, revealed)
                )
            spans.append((len(prompt), len(answered)))
        return spans

    def _render(self, template: str, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=generation_prompt
            )
        # Templates are programs: besides their own errors they raise what their filters and operators raise.
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"the chat template refuses the first {len(messages)} messages: {error}") from error
        return str(text)


def _trained_tokens(tokens: Tokenized, spans: Sequence[Span], controls: NDArray[np.int32]) -> NDArray[np.bool_]:
    trained = np.zeros(len(tokens.ids), dtype=np.bool_)
    is_control = np.isin(tokens.ids, controls)
    for first, last in spans:
        begins_inside = (first <= tokens.begins) & (tokens.begins < last)
        overlaps = (tokens.begins < last) & (first < tokens.ends)
        trained |= begins_inside | (overlaps & ~is_control)
    return trained


def _weighted(ids: Sequence[int], trained_from: int) -> Encoded:
    weights = np.zeros(len(ids), dtype=np.float32)
    weights[trained_from:] = 1.0
    return Encoded(np.array(ids, dtype=np.int32), _without_first(weights))


def _without_first(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    weights[:1] = 0.0
    return weights


def _mismatch(what: str, expected: str, found: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(expected, found, strict=False)) if a != b), len(found))
    before, after = expected[max(0, at - 20) : at + 20], found[max(0, at - 20) : at + 20]
    return f"{what} {before!r}: it becomes {after!r}; masks of such templates would be wrong"
