"""Write prompts as token ids, exactly as training writes what comes before an answer.

The chat template, its variables and its date are those of the data, the generation prompt is added, and no content
becomes a control token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launcher.contract.spec import DataSpec
from sft.data.encoding.chat import ChatRenderer
from sft.data.encoding.escape import ControlTokens
from sft.data.encoding.tokenizer import ChatTemplates, leading_ids
from sft.data.reading.messages import Message, Tool

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as text, control tokens spelled out, and as ids."""

    text: str
    ids: tuple[int, ...]


class PromptWriter:
    """Writes prompts with one tokenizer and one chat template, or without a template if that is None."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplates | None, data: DataSpec) -> None:
        self._tokenizer = tokenizer
        self._renderer = None
        if template is not None:
            self._renderer = ChatRenderer(tokenizer, template, ControlTokens(tokenizer), data)

    def question(self, text: str) -> Prompt:
        """Return the prompt of a text: the turn of a user, or without a template the text as it is."""
        if self._renderer is not None:
            return self.conversation((Message("user", text),))
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        leading = leading_ids(self._tokenizer)
        return Prompt(text, tuple(ids if ids[: len(leading)] == leading else leading + ids))

    def conversation(self, turns: Sequence[Message], tools: Sequence[Tool] = ()) -> Prompt:
        """Return the prompt for an answer to `turns`, or raise DataError if the template refuses them."""
        assert self._renderer is not None, "a conversation needs a template"
        text = self._renderer.prompt(turns, tools)
        controls = self._renderer.controls
        return Prompt(controls.reveal(text), tuple(int(token) for token in controls.tokenize(text).ids))
