"""Tokenize rendered conversations so that no content can become a control token.

`<|im_end|>` in a user's message is text. Tokenizing the rendered conversation, as transformers does, would turn it into
the control token and train the model on turns that end where a user says so. So control tokens in content are hidden
behind placeholder characters before the template is rendered. Each piece between two control tokens of the template
that holds placeholders is then tokenized again, as plain text with the spellings back in place.

A conversation without such spellings is tokenized once, as a whole, and gets exactly the ids of
`apply_chat_template(tokenize=True)`.

Rejected: tokenizing turn by turn and joining the ids (generation sees other ids where a token would span two turns),
and cutting the text at each hidden spelling (other tokens for the words around it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from launcher.contract.errors import DataError, ModelError
from sft.data.encoding.tokenizer import control_tokens

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_T = TypeVar("_T")

_PLACEHOLDERS = 0x100000
"""First placeholder. It is in Unicode's last private use plane, which texts do not use."""

_ESCAPED = re.compile(r"\\udbc0\\udc[0-9a-f]{2}")
"""A placeholder as a template's `tojson` writes it in ASCII."""

_ANCHORS = ("", "\n", "a", "\u00e9")
"""Texts to put before a piece so that it is tokenized as inside a conversation (see `_plain`)."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Token ids of a text, and the characters that each token stands for, which together cover the text."""

    text: str
    ids: NDArray[np.int32]
    begins: NDArray[np.int64]
    """First character of each token."""
    ends: NDArray[np.int64]
    """The character after the last of each token."""


class ControlTokens:
    """Hides the control tokens of a tokenizer in content, and tokenizes the rendered text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "model.tokenizer: conversations need a fast tokenizer (a tokenizer.json), which says which characters "
                "a token stands for; convert it with transformers' convert_slow_tokenizer, or set "
                "data.chat_template: none"
            )
        self._tokenizer = tokenizer
        spellings = control_tokens(tokenizer)
        # Longest first: where one spelling begins another, a tokenizer takes the longer one.
        self._spellings = sorted(spellings, key=len, reverse=True)
        self._placeholders = {text: chr(_PLACEHOLDERS + n) for n, text in enumerate(self._spellings)}
        self._spelled = re.compile("|".join(map(re.escape, self._spellings)) or r"(?!)")
        self._first = re.compile(rf"\s*(?:{self._spelled.pattern})")
        self._endings = tuple(self._spellings)
        self._hidden = re.compile(f"[{chr(_PLACEHOLDERS)}-{chr(_PLACEHOLDERS + len(spellings))}]")
        self._spelling_ids = spellings
        self.ids = np.array(sorted(spellings.values()), dtype=np.int32)
        self._control = np.zeros(max([*tokenizer.get_vocab().values(), *self.ids]) + 1, dtype=np.bool_)
        self._control[self.ids] = True
        self._backend = _backend_of(tokenizer)

    def among(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which of a tokenizer's ids are those of control tokens."""
        return self._control[ids]

    def hide(self, content: str) -> str:
        """Return `content` with placeholders for control tokens, or raise DataError if it holds one already."""
        if reserved := self._hidden.search(content):
            raise DataError(
                f"the content holds U+{ord(reserved[0]):X}, a private use character that stands for a special token "
                "here; remove it from the data"
            )
        return self._spelled.sub(lambda match: self._placeholders[match[0]], content)

    def hide_in(self, value: _T) -> _T:
        """Return a JSON value of the same form with placeholders in all its texts, keys included."""
        hidden: object = value
        if isinstance(value, str):
            hidden = self.hide(value)
        elif isinstance(value, Mapping):
            hidden = {self.hide_in(name): self.hide_in(item) for name, item in value.items()}
        elif isinstance(value, list):
            hidden = [self.hide_in(item) for item in value]
        return cast(_T, hidden)

    def trailing(self, text: str) -> list[int]:
        """Return the lengths of `text` without 0, 1, 2, ... of the control tokens and spaces at its end."""
        cuts = [len(text)]
        while True:
            end = len(text[: cuts[-1]].rstrip())
            if end < cuts[-1]:
                cuts.append(end)
            spelled = next((spelled for spelled in self._spellings if text.endswith(spelled, 0, end)), None)
            if spelled is None:
                return cuts
            cuts.append(end - len(spelled))

    def ends_with_control(self, text: str) -> bool:
        """Return whether `text` ends with a control token, apart from spaces."""
        return text.rstrip().endswith(self._endings)

    def leading(self, text: str) -> int:
        """Return the length of the control token that `text` begins with, spaces before it included, or 0."""
        first = self._first.match(text)
        return first.end() if first else 0

    def reveal(self, text: str) -> str:
        """Return `text` with placeholders replaced by the spellings they stand for."""
        return self._hidden.sub(lambda match: self._spellings[ord(match[0]) - _PLACEHOLDERS], text)

    def hides_in(self, text: str) -> bool:
        """Return whether `text` holds placeholders."""
        return self._hidden.search(text) is not None

    def tokenize(self, text: str) -> Tokenized:
        """Return the tokens of a rendered text, its placeholders revealed and tokenized as plain text.

        Raise DataError where the tokenizer cannot do that.
        """
        if _ESCAPED.search(text):
            raise DataError(
                "the content spells a special token, and the chat template writes it in JSON escapes, where it cannot "
                "be restored; remove it from the data"
            )
        whole = self._encode(text)
        if not self.hides_in(text):
            return whole
        pieces: list[Tokenized] = []
        for first, last in self._runs(whole):
            begin = int(whole.begins[first])
            piece = text[begin : int(whole.ends[last - 1])]
            part = slice(first, last)
            if self.hides_in(piece):
                pieces.append(self._plain(piece, whole.ids[part]))
            else:
                pieces.append(Tokenized(piece, whole.ids[part], whole.begins[part] - begin, whole.ends[part] - begin))
        return _join(pieces)

    def _runs(self, tokens: Tokenized) -> list[tuple[int, int]]:
        """Return the runs of plain tokens and of control tokens: index of the first, and one after the last."""
        edges = np.flatnonzero(np.diff(self._written(tokens))) + 1
        return list(pairwise([0, *edges.tolist(), len(tokens.ids)]))

    def _written(self, tokens: Tokenized) -> NDArray[np.bool_]:
        """Return which tokens are control tokens that the template wrote."""
        written = self.among(tokens.ids)
        # The id alone does not decide: `<unk>` also stands for text that the tokenizer does not know.
        for index in np.flatnonzero(written):
            spelled = tokens.text[int(tokens.begins[index]) : int(tokens.ends[index])].strip()
            written[index] = self._spelling_ids.get(spelled) == tokens.ids[index]
        return written

    def _plain(self, piece: str, ids: NDArray[np.int32]) -> Tokenized:
        """Return the tokens of `piece` with its placeholders revealed, as they would be inside the conversation.

        `ids` are those of the piece, with placeholders, inside the conversation. A tokenizer may treat the beginning of
        a text specially (SentencePiece adds a space). The anchor that avoids that is the one after which the piece with
        placeholders gets `ids`.
        """
        for anchor in _ANCHORS:
            tried = self._after(anchor, piece)
            if tried is not None and np.array_equal(tried.ids, ids):
                revealed = self._after(anchor, self.reveal(piece))
                # Some vocabularies have the spelling as an ordinary word with the same id.
                if revealed is not None and not self._written(revealed).any():
                    return revealed
        raise DataError(
            "the content spells a special token that this tokenizer cannot tokenize as plain text there; "
            "remove it from the data"
        )

    def _after(self, anchor: str, piece: str) -> Tokenized | None:
        """Return the tokens of `piece` when it follows `anchor`, None if a token spans both."""
        tokens = self._encode(anchor + piece, split_special_tokens=True)
        first = int(np.searchsorted(tokens.ends, len(anchor), side="right")) if anchor else 0
        begins = tokens.begins[first:] - len(anchor)
        if len(begins) and begins[0] < 0:
            return None
        return Tokenized(piece, tokens.ids[first:], begins, tokens.ends[first:] - len(anchor))

    def _encode(self, text: str, **options: bool) -> Tokenized:
        if self._backend is None or options:
            encoded = self._tokenizer(
                text,
                add_special_tokens=False,
                return_offsets_mapping=True,
                return_attention_mask=False,
                return_token_type_ids=False,
                **options,
            )
            ids, places = encoded["input_ids"], encoded["offset_mapping"]
        else:
            self._backend.encode_special_tokens = False  # a call with options may have set it
            direct = self._backend.encode(text, add_special_tokens=False)
            ids, places = direct.ids, direct.offsets
        # From a flat iterator: of a list of pairs, NumPy would look at each pair first.
        numbers = np.fromiter(chain.from_iterable(places), dtype=np.int64, count=2 * len(places))
        offsets = numbers.reshape(-1, 2)
        starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
        # Some tokenizers do not count the space before a word among its characters: let a token begin where the one
        # before it ends. Tokens that are bytes of one character all begin where that character does.
        begins = np.minimum(starts, np.concatenate([[0], ends[:-1]])) if len(ends) else starts
        return Tokenized(text, np.array(ids, dtype=np.int32), begins, ends)


def _backend_of(tokenizer: PreTrainedTokenizerBase) -> Tokenizer | None:
    """Return what a fast tokenizer calls, or None for one that does more than to call it.

    Called directly it takes two thirds of the time: what transformers makes of the answer is not needed here.
    """
    from transformers import PreTrainedTokenizerFast

    ways = ("__call__", "_encode_plus")
    known = (getattr(PreTrainedTokenizerFast, name, None) for name in ways)
    if any(way is None or getattr(type(tokenizer), name) is not way for name, way in zip(ways, known, strict=True)):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    # As transformers does at each call: a tokenizer.json may ask for either.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _join(pieces: list[Tokenized]) -> Tokenized:
    shifts = np.cumsum([0] + [len(piece.text) for piece in pieces])
    return Tokenized(
        "".join(piece.text for piece in pieces),
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.begins + shift for piece, shift in zip(pieces, shifts[:-1], strict=True)]),
        np.concatenate([piece.ends + shift for piece, shift in zip(pieces, shifts[:-1], strict=True)]),
    )
