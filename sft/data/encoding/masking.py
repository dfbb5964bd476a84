"""Turn examples into token ids and the loss weight of each token as a target.

A conversation is rendered once and tokenized once, so its ids are those of `apply_chat_template`. Which tokens are
trained follows from characters (sft/data/encoding/chat.py): a plain token is trained if any of its characters belongs
to the answer, a control token if its first character does. Trained tokens across an edge are counted.

A `text`, and prompt and completion with data.chat_template `none`, are tokenized as they are: special tokens spelled in
them are special tokens, because someone who writes the whole format by hand means them. In conversations they are plain
text (sft/data/encoding/escape.py).

Rejected: `{% generation %}` masks (few templates have them), searching for the ids of the answer (they depend on what
is before it), and tokenizing turn by turn (generation sees other ids).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from launcher.contract.errors import DataError, ModelError
from launcher.contract.spec import DataSpec
from sft.data.encoding.chat import ChatRenderer, Rendered, Span
from sft.data.encoding.escape import ControlTokens, Tokenized
from sft.data.encoding.tokenizer import chat_template, control_tokens, end_of_text, leading_ids
from sft.data.reading.formats import Example
from sft.data.reading.messages import Message
from sft.data.reading.policies import NEEDS_TEMPLATE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_NAMES = "messages[].name (by the chat template)"


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example's tokens."""

    ids: NDArray[np.int32]
    weights: NDArray[np.float32]
    """Loss weight of predicting each token. That of the first is 0: nothing predicts it."""
    ends: NDArray[np.bool_]
    """Which tokens end an answer."""
    answers: int = 1
    """Answers that are trained."""
    straddling: int = 0
    """Trained tokens with characters on both sides of an edge of a trained span."""
    escaped: bool = False
    """Whether content spells special tokens."""
    unused: int = 0
    """Messages after the last trained one, which are left out."""


def encode(example: Example, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> list[Encoded]:
    """Return ids and loss weights of one example. For many examples, keep an `Encoder`."""
    return Encoder(tokenizer, spec).encode(example)


class Encoder:
    """Encodes examples with one tokenizer, template and loss policy."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, spec: DataSpec) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._control_ids = np.array(sorted(control_tokens(tokenizer).values()), dtype=np.int32)
        self._renderer: ChatRenderer | None = None

    def encode(self, example: Example) -> list[Encoded]:
        """Return ids and loss weights of `example`: one item, or several with data.on_mismatch split.

        Raise DataError with the row for an example that cannot be trained.
        """
        if example.ids is not None:
            return [self._weighted(example.ids, np.array(example.weights, dtype=np.float32))]
        if example.text is not None:
            return [self._trained_from(self._closed(self._opened(example.text)), 0)]
        if example.completion is not None and self._spec.chat_template == "none":
            return [self._joined(example.prompt, example.completion)]
        return self._conversation(_as_turns(example))

    def unread(self, example: Example) -> tuple[str, ...]:
        """Return the keys of turns that are handed to the chat template, and that it does not write."""
        return (_NAMES,) if example.messages and self._chat_renderer().drops_names(example) else ()

    def inspect(self, example: Example) -> list[tuple[Encoded, list[str]]]:
        """Return what `encode` returns, each item with the role that each of its tokens belongs to."""
        encoded = self.encode(example)
        if not (example.messages or (example.completion is not None and self._spec.chat_template != "none")):
            return [(each, ["trained" if weight else "prompt" for weight in each.weights]) for each in encoded]
        renderer, example = self._chat_renderer(), _as_turns(example)
        inspected = []
        for each, rendered in zip(encoded, renderer.render(example), strict=True):
            turns = renderer.turn_ends(example, rendered.text)
            ends = [len(renderer.controls.reveal(rendered.text[:end])) for _, end in turns]
            begins = renderer.controls.tokenize(rendered.text).begins
            names = [*(role for role, _ in turns), "end"]
            inspected.append((each, [names[index] for index in np.searchsorted(ends, begins, side="right")]))
        return inspected

    def _joined(self, prompt: str, completion: str) -> Encoded:
        """Return prompt and completion as one example, in which tokens with a character of the completion are trained.

        Raise ModelError if the tokenizer does not say which characters a token stands for.
        """
        # As one text: apart, a SentencePiece tokenizer would put its word mark before the completion. `1+1=` and `2`
        # would give a token for " 2", which is not what the two together say.
        text = prompt + completion
        ids = self._opened(text)
        if self._spec.loss_on == "all":
            return self._trained_from(self._closed(ids), 0)
        if not self._tokenizer.is_fast:
            raise ModelError(
                "model.tokenizer: prompt and completion need a fast tokenizer (a tokenizer.json), which says which "
                "characters a token stands for; convert it with transformers' convert_slow_tokenizer"
            )
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        in_prompt = sum(1 for _, end in encoded["offset_mapping"] if end <= len(prompt))
        crossing = any(begin < len(prompt) < end for begin, end in encoded["offset_mapping"])
        added = len(ids) - len(encoded["input_ids"])  # the BOS, if the tokenizer puts one first
        trained = self._trained_from(self._closed(ids), added + in_prompt)
        return dataclasses.replace(trained, straddling=int(crossing))

    def _opened(self, text: str) -> list[int]:
        """Return the ids of `text`, with the BOS that the tokenizer puts first, once even if `text` spells it."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        leading = leading_ids(self._tokenizer)
        return ids if ids[: len(leading)] == leading else leading + ids

    def _closed(self, ids: list[int]) -> list[int]:
        """Return `ids` with the end token last, once."""
        end = end_of_text(self._tokenizer)
        return ids if ids and ids[-1] == end else [*ids, end]

    def _trained_from(self, ids: Sequence[int], first: int) -> Encoded:
        """Return an example in which the tokens from index `first` on are trained."""
        weights = np.ones(len(ids), dtype=np.float32)
        weights[:first] = 0.0
        return self._weighted(ids, weights)

    def _weighted(self, ids: Sequence[int], weights: NDArray[np.float32]) -> Encoded:
        """Return an example with these weights. Each run of trained tokens counts as an answer."""
        known = np.array(ids, dtype=np.int32)
        trained = weights > 0
        last = trained & ~np.append(trained[1:], False)
        ends = last & np.isin(known, self._control_ids)
        return Encoded(known, _without_first(weights), ends, answers=int(np.count_nonzero(last)))

    def _conversation(self, example: Example) -> list[Encoded]:
        renderer = self._chat_renderer()
        try:
            renderer.reads.check(example.unread, self._spec.ignore_keys)
            return [self._tokenized(rendered, renderer.controls) for rendered in renderer.render(example)]
        except DataError as error:
            raise DataError([f"{example.where}: {problem}" for problem in error.problems]) from error

    def _chat_renderer(self) -> ChatRenderer:
        if self._renderer is None:
            template = chat_template(self._tokenizer, self._spec)
            if template is None:
                raise ModelError(NEEDS_TEMPLATE)
            self._renderer = ChatRenderer(self._tokenizer, template, ControlTokens(self._tokenizer), self._spec)
        return self._renderer

    def _tokenized(self, rendered: Rendered, controls: ControlTokens) -> Encoded:
        tokens = controls.tokenize(rendered.text)
        weights = np.zeros(len(tokens.ids), dtype=np.float32)
        ends = np.zeros(len(tokens.ids), dtype=np.bool_)
        is_control = controls.among(tokens.ids)
        crossing = 0
        for begin, end, weight in _revealed(rendered, controls):
            near = _between(tokens, begin, end)
            part, plain = _part(tokens, near), ~is_control[near]
            inside = _tokens_of(part, begin, end, ~plain)
            weights[near][inside] = weight
            ends[near] |= _end_of(inside, ~plain, part)
            across = [(part.begins < edge) & (edge < part.ends) for edge in (begin, end)]
            crossing += int(np.count_nonzero(inside & np.logical_or(*across))) if weight else 0
        return Encoded(
            ids=tokens.ids,
            weights=_without_first(weights),
            ends=ends,
            answers=sum(1 for *_, weight in rendered.spans if weight),
            straddling=crossing,
            escaped=controls.hides_in(rendered.text),
            unused=rendered.unused,
        )


def _as_turns(example: Example) -> Example:
    """Return the example as a conversation, a prompt and its completion as two turns."""
    if example.completion is None:
        return example
    turns = (Message("user", example.prompt), Message("assistant", example.completion))
    return Example(where=example.where, messages=turns, unread=example.unread)


def _revealed(rendered: Rendered, controls: ControlTokens) -> Iterator[Span]:
    """Yield the spans in characters of the text with hidden spellings restored, as tokens count them."""
    plain = not controls.hides_in(rendered.text)
    for first, last, weight in rendered.spans:
        edges = (first, last) if plain else tuple(len(controls.reveal(rendered.text[:at])) for at in (first, last))
        yield edges[0], edges[1], weight


def _between(tokens: Tokenized, first: int, last: int) -> slice:
    """Return which tokens have a character between two places, or begin there."""
    return slice(
        int(np.searchsorted(tokens.ends, first, side="left")), int(np.searchsorted(tokens.begins, last, side="left"))
    )


def _part(tokens: Tokenized, which: slice) -> Tokenized:
    return Tokenized(tokens.text, tokens.ids[which], tokens.begins[which], tokens.ends[which])


def _tokens_of(tokens: Tokenized, first: int, last: int, is_control: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which tokens are trained by a span: those that begin in it, and plain tokens that reach into it."""
    # A control token before the answer may include the spaces after it, and so reach into the span.
    begins_inside = (first <= tokens.begins) & (tokens.begins < last)
    overlaps = (tokens.begins < last) & (first < tokens.ends)
    inside: NDArray[np.bool_] = begins_inside | (overlaps & ~is_control)
    return inside


def _end_of(inside: NDArray[np.bool_], is_control: NDArray[np.bool_], tokens: Tokenized) -> NDArray[np.bool_]:
    """Return where the control token is that ends a span: the last token but for spaces, if that is one."""
    ends = np.zeros(len(inside), dtype=np.bool_)
    for index in np.flatnonzero(inside)[::-1]:
        if is_control[index]:
            ends[index] = True
        if is_control[index] or tokens.text[int(tokens.begins[index]) : int(tokens.ends[index])].strip():
            break
    return ends


def _without_first(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    weights[:1] = 0.0
    return weights
