"""evaluation: answers during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from launcher.contract.spec.paths import ExistingFile
from launcher.contract.spec.rules import FUNCTION, Above, AtLeast, Bits, Probability


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationSpec:
    """Answers during training, at every evaluation, and what is measured on them."""

    prompts: Annotated[str | None, ExistingFile()] = None
    """A jsonl file of prompts to answer: rows with prompt, or with messages that end before an answer."""
    metric: Annotated[str | None, FUNCTION] = None
    """package.module:function, called as function(samples=, prompts=, outputs=) with lists of texts; returns name ->
    number, or name -> one number a prompt. Logged as metric/<name>, averaged over all prompts."""
    max_new_tokens: Annotated[int, AtLeast(1)] = 64
    """Longest answer in tokens."""
    temperature: Annotated[float, AtLeast(0)] = 0.0
    """0 takes the most likely token each time; above 0 tokens are sampled."""
    top_k: Annotated[int | None, AtLeast(1)] = None
    """Sample only from this many most likely tokens; needs a temperature."""
    top_p: Annotated[float, Probability()] = 1.0
    """Sample only from the most likely tokens that together have this probability; needs a temperature."""
    repetition_penalty: Annotated[float, Above(0)] = 1.0
    """Logits of tokens that the prompt or the answer holds already are divided by this if they are above 0, else
    multiplied; 1 changes nothing."""
    seed: Annotated[int, Bits(63)] = 1234
    """Seed of sampling, which needs a temperature; each prompt has a random stream of its own, whatever the
    topology."""
    stop_tokens: list[str] = field(default_factory=list)
    """Further tokens that end an answer, besides the end tokens of model and tokenizer."""
    stop_sequences: list[str] = field(default_factory=list)
    """Texts that end an answer: it is cut before the first of them, and white space before that is dropped."""
    batch_size: Annotated[int, AtLeast(1)] = 8
    """Prompts that one model replica answers at the same time."""
