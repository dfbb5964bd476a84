"""What to tell who writes another trainer's word, or a key of ours in the wrong section."""

from __future__ import annotations

import difflib

from launcher.contract.spec.fields import ANY_NAME, leaf_types
from launcher.contract.trainers import axolotl, llama_factory, trl
from launcher.contract.trainers.word import Word, at, missing

_PEFT: dict[str, Word] = {
    "r": at("model.lora.rank"),
    "target_modules": at("model.lora.targets"),
    "modules_to_save": missing("only adapters are trained with model.lora.rank"),
    "bias": missing("adapters have no biases"),
    "task_type": missing("models are causal language models"),
}
"""PEFT's LoraConfig, where trainers have other words."""

_OF_4_BITS = dict.fromkeys(
    ("qlora", "quantization", "quantization_config", "bnb_4bit", "bnb_config", "use_4bit"), trl.WORDS["load_in_4bit"]
)
"""What people call a base model of 4 bits, beside the words of trainers."""

WORDS: dict[str, Word] = {**_PEFT, **_OF_4_BITS, **axolotl.WORDS, **llama_factory.WORDS, **trl.WORDS}
"""Of all trainers; where two have the same word with another meaning, TRL's counts."""


def hint(key: str, schema: type) -> str:
    """Return what an unknown dotted key may mean, to be put behind a message, or an empty string."""
    name = key.rpartition(".")[2]
    if name in WORDS:
        return f"; {WORDS[name].hint}"
    places = [leaf for leaf, _ in leaf_types(schema) if ANY_NAME not in leaf and leaf.rpartition(".")[2] == name]
    return f"; here it is {places[0]}" if len(places) == 1 else ""


def near_hint(key: str) -> str:
    """Return what an unknown key means that is another trainer's word but for a slip, or an empty string."""
    close = difflib.get_close_matches(key.rpartition(".")[2], WORDS, n=1, cutoff=0.85)
    return f"; did you mean {close[0]!r}? {WORDS[close[0]].hint}" if close else ""
