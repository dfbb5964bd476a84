"""A conversation with a Hugging Face directory, answered token by token on this machine.

Prompts are written exactly as in training, tokens are chosen by the sampling of evaluations, and an answer ends with
the tokens that the model was trained to stop with.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import ConfigError
from launcher.contract.spec import DataSpec, EvaluationSpec
from sft.data.encoding.prompt import PromptWriter
from sft.data.encoding.tokenizer import chat_template, load_tokenizer
from sft.data.reading.messages import Message
from sft.generation.sampling import next_tokens, penalized, stream
from sft.hf.answer import load_for_answers

_UNFINISHED = "\ufffd"
"""What a tokenizer writes for the first bytes of a character."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Talker:
    """A model with its tokenizer and the way it is asked."""

    model: Any
    """Of transformers, whose models have no common type."""
    tokenizer: PreTrainedTokenizerBase
    writer: PromptWriter
    has_template: bool
    stops: Collection[int]
    sampling: EvaluationSpec

    def answer(self, turns: Sequence[Message], number: int) -> Iterator[str]:
        """Yield the answer to `turns` in pieces of text, as they come. Answer `number` has a random stream of its own.

        Raise DataError where the chat template refuses the turns, ConfigError where they are too long for the model.
        """
        if self.has_template:
            ids = list(self.writer.conversation(turns).ids)
        elif turns[0].role == "system":
            raise ConfigError("the model has no chat template, which would say where a system message stands; /reset")
        else:
            ids = list(self.writer.question(turns[-1].content or "").ids)
        positions = getattr(self.model.config, "max_position_embeddings", None)
        if positions is not None and len(ids) >= positions:
            raise ConfigError(f"the conversation has {len(ids):,} tokens, and the model {positions:,} positions")
        room = (
            self.sampling.max_new_tokens
            if positions is None
            else min(self.sampling.max_new_tokens, positions - len(ids))
        )
        said: list[int] = []
        shown = text = ""
        for token in self._tokens(ids, room, number):
            said.append(token)
            text = str(self.tokenizer.decode(said, skip_special_tokens=True))
            if not text.endswith(_UNFINISHED):
                yield text[len(shown) :]
                shown = text
        if text != shown:
            yield text[len(shown) :]

    @torch.no_grad()
    def _tokens(self, prompt: Sequence[int], room: int, number: int) -> Iterator[int]:
        """Yield the tokens of an answer, without the one that ends it."""
        own = stream(self.sampling.seed, number)
        known = torch.tensor([prompt], device=self.model.device)
        fresh, cache = known, None
        for _ in range(room):
            output = self.model(input_ids=fresh, past_key_values=cache, use_cache=True)
            cache, logits = output.past_key_values, output.logits[:, -1].float()
            if self.sampling.repetition_penalty != 1.0:
                logits = penalized(logits, known, self.sampling.repetition_penalty)
            token = int(next_tokens(logits, self.sampling, [own]))
            if token in self.stops:
                return
            yield token
            fresh = torch.tensor([[token]], device=self.model.device)
            known = torch.cat([known, fresh], dim=1)


def load_talker(directory: Path, data: DataSpec, sampling: EvaluationSpec, stops: Collection[int]) -> Talker:
    """Load the model or adapter in `directory`. Raise ModelError where its tokenizer cannot be used."""
    tokenizer = load_tokenizer(directory)
    has_template = data.chat_template != "none" and bool(tokenizer.chat_template)
    template = chat_template(tokenizer, data) if has_template else None
    return Talker(
        model=load_for_answers(directory),
        tokenizer=tokenizer,
        writer=PromptWriter(tokenizer, template, data),
        has_template=has_template,
        stops=stops,
        sampling=sampling,
    )
