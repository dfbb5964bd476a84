"""Turn samples into token ids and loss masks, step by step as trlx's NeMo trainer does.

Tokenize without special tokens, cut to `seq_length` on the tokenizer's truncation side, add BOS before and EOS after if
the config says so, and keep the first `max_length` ids. Of a text all ids are trained, of prompts and outputs the
outputs. Padding follows from lengths, so an end token that is also the padding token keeps its weight.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from launcher.contract.errors import DataError
from sft.data.batches.sampler import cyclic_order

Sample = str | Sequence[str]
"""A text; or prompt and completion; or prompt, output, prompt, output, and so on."""

_T = TypeVar("_T")


class ShuffledCyclicSequence(Generic[_T]):
    """`data` repeated to `new_length` places, in an order given by a random permutation of the places."""

    def __init__(self, new_length: int, data: Sequence[_T], seed: int) -> None:
        self.new_length = new_length
        self.data = data
        self.perm = torch.from_numpy(cyclic_order(new_length, seed))

    def __len__(self) -> int:
        return self.new_length

    def __getitem__(self, idx: int) -> _T:
        return self.data[int(self.perm[idx]) % len(self.data)]


@dataclass(frozen=True, slots=True)
class Tokens:
    """The ids of one sample, and 1.0 for each that is trained."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[float, ...]

    @property
    def has_targets(self) -> bool:
        """Whether anything is learnt from it."""
        return any(self.loss_mask[1:])  # nothing predicts the first token


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleEncoder:
    """Turns samples into tokens."""

    tokenizer: PreTrainedTokenizerBase
    seq_length: int
    """Length to cut a sample to before BOS and EOS are added (train.seq_length)."""
    max_length: int
    """Length to cut it to after that (model.encoder_seq_length)."""
    add_bos: bool = False
    add_eos: bool = True

    def __call__(self, sample: Sample, where: str = "sample") -> Tokens:
        """Return the tokens of a sample, or raise DataError beginning with `where`."""
        ids, mask = self._phrases(sample, where)
        side = self.tokenizer.truncation_side
        ids, mask = _cut(ids, self.seq_length, side), _cut(mask, self.seq_length, side)
        if self.add_bos:
            ids, mask = [self._special("bos"), *ids], [float(isinstance(sample, str)), *mask]
        if self.add_eos and (isinstance(sample, str) or ids[-1:] != [self._special("eos")]):
            ids, mask = [*ids, self._special("eos")], [*mask, 1.0]
        return Tokens(tuple(ids[: self.max_length]), tuple(mask[: self.max_length]))

    def _phrases(self, sample: Sample, where: str) -> tuple[list[int], list[float]]:
        if isinstance(sample, str):
            ids = self._ids(sample)
            return ids, [1.0] * len(ids)
        if isinstance(sample, Mapping) or not all(isinstance(phrase, str) for phrase in sample):
            raise DataError(
                f"{where}: a sample is a text, or prompts and outputs in turn; messages with roles need a chat "
                "template: write them to a file and name it in data.train (docs/how-to/data.md)"
            )
        if not sample or len(sample) % 2:
            raise DataError(f"{where}: {len(sample)} texts; prompts and outputs in turn are an even number")
        phrases = [self._ids(phrase) for phrase in sample]
        mask = [float(number % 2) for number, ids in enumerate(phrases) for _ in ids]
        return [token for ids in phrases for token in ids], mask

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _special(self, name: str) -> int:
        token = getattr(self.tokenizer, f"{name}_token_id")
        if not isinstance(token, int):
            raise DataError(f"model.data.add_{name}: the tokenizer has no {name}_token; set it to False")
        return token


def _cut(values: list[_T], length: int, side: str) -> list[_T]:
    return values[max(len(values) - length, 0) :] if side == "left" else values[:length]


def collate(samples: Sequence[Tokens], length: int, pad_id: int) -> tuple[Tensor, Tensor]:
    """Return ids and masks [b, length], padded on the right: the batch that trlx gives its model.

    It is for comparison. Our batches are padded only to the longest row, which does not change the loss.
    """
    ids = [[*sample.input_ids, *[pad_id] * (length - len(sample.input_ids))] for sample in samples]
    masks = [[*sample.loss_mask, *[0.0] * (length - len(sample.loss_mask))] for sample in samples]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(masks, dtype=torch.float)


class PromptPipeline(Sequence[dict[str, Any]]):
    """Tokenized prompts. Of prompts that are dicts, the other keys are kept."""

    def __init__(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        max_prompt_length: int,
        tokenizer: PreTrainedTokenizerBase,
        add_special_tokens: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        rows = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
        for number, row in enumerate(rows):
            if not isinstance(row.get("prompt"), str):
                raise DataError(f"eval_prompts[{number}]: a prompt is a text, or a dict that has it as 'prompt'")
        self.prompts = [
            {"input_ids": self._ids(row["prompt"], max_prompt_length, add_special_tokens), **row} for row in rows
        ]

    def _ids(self, text: str, length: int, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return _cut(ids, length, self.tokenizer.truncation_side)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: Any) -> Any:
        return self.prompts[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.prompts)
