"""evaluation: answers during training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from launcher.contract.spec.paths import ExistingFile
from launcher.contract.spec.rules import FUNCTION, Above, AtLeast, Probability


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
    """0 takes the likeliest token each time; above it tokens are drawn."""
    top_k: Annotated[int | None, AtLeast(1)] = None
    """Draw from this many likeliest tokens only."""
    top_p: Annotated[float, Probability()] = 1.0
    """Draw from the likeliest tokens that together have this probability."""
    repetition_penalty: Annotated[float, Above(0)] = 1.0
    """Logits of tokens that prompt or answer already hold are divided by this where they are above 0, else multiplied;
    1 leaves them alone."""
    seed: int = 1234
    """Seed of the draws; each prompt has a stream of its own, whatever the topology."""
    stop_tokens: list[str] = field(default_factory=list)
    """Further tokens that end an answer, beside the end tokens of model and tokenizer."""
    stop_sequences: list[str] = field(default_factory=list)
    """Texts that end an answer: it is cut before the first of them, with the white space in front of it."""
    batch_size: Annotated[int, AtLeast(1)] = 8
    """Prompts that one model replica answers together."""
