"""Token ids of a rendered conversation in which nobody's text can become a control token.

`<|im_end|>` typed by a user is text. Tokenizing the rendered conversation would turn it into the control token, as
transformers does, and train the model on turns that end where a user says so. So control tokens in content are
hidden behind placeholder characters before the template is rendered, and what lies between two control tokens of the
template is tokenized again, with the hidden text back in its place, as text.

Text without such spellings gets exactly the ids of `apply_chat_template(tokenize=True)`: the conversation is
tokenized once, as a whole.

Rejected: tokenizing turn by turn and joining (other ids than generation sees where a token lies across the seam),
and cutting the text at each hidden spelling (which breaks the words around it).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import DataError, ModelError
from sft.data.encoding.tokenizer import control_tokens

_PLACEHOLDERS = 0x100000
"""First placeholder: the last private plane of Unicode, which no text has a use for."""

_ESCAPED = re.compile(r"\\udbc0\\udc[0-9a-f]{2}")
"""A placeholder as `tojson` writes it when told to write ASCII."""

_ANCHORS = ("", "\n", "a", "\u00e9")
"""Texts to put in front of a piece so that it is tokenized as it would be inside a conversation."""


@dataclass(frozen=True, slots=True)
class Tokenized:
    """Ids of a text, and the characters each stands for; the characters of all tokens tile the text."""

    text: str
    ids: NDArray[np.int32]
    begins: NDArray[np.int64]
    ends: NDArray[np.int64]


class ControlTokens:
    """The control tokens of a tokenizer: hides their spelling in content, and tokenizes what was rendered."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "model.tokenizer: conversations need a tokenizer that tells which characters a token stands for "
                "(a tokenizer.json); convert it with transformers' convert_slow_tokenizer, or use "
                "data.chat_template none"
            )
        self._tokenizer = tokenizer
        spellings = control_tokens(tokenizer)
        # The longest first: of two that begin alike a tokenizer takes the longer one.
        self._spellings = sorted(spellings, key=len, reverse=True)
        self._placeholders = {text: chr(_PLACEHOLDERS + n) for n, text in enumerate(self._spellings)}
        self._spelled = re.compile("|".join(map(re.escape, self._spellings)) or r"(?!)")
        self._first = re.compile(rf"\s*(?:{self._spelled.pattern})")
        self._endings = tuple(self._spellings)
        self._hidden = re.compile(f"[{chr(_PLACEHOLDERS)}-{chr(_PLACEHOLDERS + len(spellings))}]")
        self._spelling_ids = spellings
        self.ids = np.array(sorted(spellings.values()), dtype=np.int32)

    def hide(self, content: str) -> str:
        """`content` with placeholders for control tokens."""
        if reserved := self._hidden.search(content):
            raise DataError(f"the content holds U+{ord(reserved[0]):X}, a private character that stands for a token")
        return self._spelled.sub(lambda match: self._placeholders[match[0]], content)

    def hide_in(self, value: Any) -> Any:
        """A JSON value with placeholders in all its texts, keys among them."""
        if isinstance(value, str):
            return self.hide(value)
        if isinstance(value, Mapping):
            return {self.hide_in(name): self.hide_in(item) for name, item in value.items()}
        return [self.hide_in(item) for item in value] if isinstance(value, list) else value

    def trailing(self, text: str) -> list[int]:
        """Lengths that `text` may be cut to by taking control tokens off its end, the longest first."""
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
        """Whether a control token ends `text`, spaces aside."""
        return text.rstrip().endswith(self._endings)

    def leading(self, text: str) -> int:
        """Length of the control token that `text` begins with, spaces before it included; 0 where there is none."""
        found = self._first.match(text)
        return found.end() if found else 0

    def reveal(self, text: str) -> str:
        """`text` with control tokens spelled out again."""
        return self._hidden.sub(lambda match: self._spellings[ord(match[0]) - _PLACEHOLDERS], text)

    def hides_in(self, text: str) -> bool:
        """Whether `text` holds placeholders."""
        return self._hidden.search(text) is not None

    def tokenize(self, text: str) -> Tokenized:
        """Ids of a rendered text; where it hides control tokens, they are revealed and tokenized as plain text."""
        if _ESCAPED.search(text):
            raise DataError("the chat template writes a special token, which the content spells, in JSON escapes")
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
        """Where runs of plain tokens and of control tokens begin and end."""
        edges = np.flatnonzero(np.diff(self._written(tokens))) + 1
        return list(pairwise([0, *edges.tolist(), len(tokens.ids)]))

    def _written(self, tokens: Tokenized) -> NDArray[np.bool_]:
        """Which tokens are control tokens that the text spells; `<unk>` also stands for text that is unknown."""
        written = np.isin(tokens.ids, self.ids)
        for index in np.flatnonzero(written):
            spelled = tokens.text[int(tokens.begins[index]) : int(tokens.ends[index])].strip()
            written[index] = self._spelling_ids.get(spelled) == tokens.ids[index]
        return written

    def _plain(self, piece: str, ids: NDArray[np.int32]) -> Tokenized:
        """Tokens of a piece with its placeholders revealed, as they are inside the conversation.

        A tokenizer may treat the beginning of a text in a way of its own (SentencePiece adds a space). Which anchor
        undoes that is found out on the piece with placeholders, whose ids inside the conversation are known.
        """
        for anchor in _ANCHORS:
            tried = self._after(anchor, piece)
            if tried is not None and np.array_equal(tried.ids, ids):
                revealed = self._after(anchor, self.reveal(piece))
                # A vocabulary may hold the spelling as a word like any other.
                if revealed is not None and not self._written(revealed).any():
                    return revealed
        raise DataError("the content spells a special token that this tokenizer cannot take as plain text there")

    def _after(self, anchor: str, piece: str) -> Tokenized | None:
        tokens = self._encode(anchor + piece, split_special_tokens=True)
        first = int(np.searchsorted(tokens.ends, len(anchor), side="right")) if anchor else 0
        begins = tokens.begins[first:] - len(anchor)
        if len(begins) and begins[0] < 0:
            return None
        return Tokenized(piece, tokens.ids[first:], begins, tokens.ends[first:] - len(anchor))

    def _encode(self, text: str, **options: Any) -> Tokenized:
        encoded = self._tokenizer(
            text,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            **options,
        )
        offsets = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        starts, ends = offsets[:, 0], np.maximum.accumulate(offsets[:, 1])
        # Some tokenizers leave out the space in front of a word from its characters: a token begins where the one
        # before it ends. Tokens that share a character (its bytes) begin where that character does.
        begins = np.minimum(starts, np.concatenate([[0], ends[:-1]])) if len(ends) else starts
        return Tokenized(text, np.array(encoded["input_ids"], dtype=np.int32), begins, ends)


def _join(pieces: list[Tokenized]) -> Tokenized:
    shifts = np.cumsum([0] + [len(piece.text) for piece in pieces])
    return Tokenized(
        "".join(piece.text for piece in pieces),
        np.concatenate([piece.ids for piece in pieces]),
        np.concatenate([piece.begins + shift for piece, shift in zip(pieces, shifts[:-1], strict=True)]),
        np.concatenate([piece.ends + shift for piece, shift in zip(pieces, shifts[:-1], strict=True)]),
    )
