"""A Hugging Face directory small enough to train in a test, and chat rows to train it on.

Everything that a real model has and that a conversion can get wrong is in it: grouped-query attention, a vocabulary
that no topology divides, biases and norms that are not what a fresh model has, a ChatML template.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 331
"""Prime: padding the vocabulary for tensor parallel ranks can then never be skipped."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
_FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
_COLOURS = ("red", "green", "blue", "amber", "violet", "white", "grey", "black")
_ANIMALS = ("otter", "heron", "lynx", "badger", "finch", "newt", "marten", "stoat")


def make_tiny_model(
    path: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    layers: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    tied: bool = False,
    family: Literal["llama", "qwen2", "qwen3"] = "llama",
    seed: int = 0,
) -> Path:
    """Write config, fp32 weights and tokenizer to `path`; the same arguments give the same bytes."""
    config_class, model_class = _FAMILIES[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=16 * heads,
        intermediate_size=40 * heads,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        bos_token_id=None,
        eos_token_id=_SPECIAL.index("<|im_end|>"),
        pad_token_id=_SPECIAL.index("<|pad|>"),
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config)
        _unsettle_vectors(model)
    model.save_pretrained(path)
    make_tokenizer(vocab_size).save_pretrained(path)
    return path


def make_tokenizer(vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with exactly `vocab_size` entries and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [message["content"] for row in make_chat_rows(200, seed=0) for message in row["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(f"the training text gives {tokenizer.get_vocab_size()} entries, not {vocab_size}")
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_chat_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Return `messages` rows of one to three turns, of different lengths, some with a system message."""
    draw = random.Random(seed)
    return [{"messages": _conversation(draw)} for _ in range(count)]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _conversation(draw: random.Random) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": "Answer briefly."}] if draw.random() < 0.3 else []
    for _ in range(draw.randint(1, 3)):
        colour, animal, count = draw.choice(_COLOURS), draw.choice(_ANIMALS), draw.randint(2, 40)
        question = f"I saw {count} {animal}s and one was {colour}. How many were not?"
        answer = f"{count - 1} {animal}s were not {colour}." + " Was it by the river?" * draw.randint(0, 2)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def _unsettle_vectors(model: torch.nn.Module) -> None:
    """Move norms off 1 and biases off 0, where swapping or dropping one of them would go unseen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


FLASH4_HEAD_DIM = 32
"""The smallest head that FlashAttention-4 takes: packed runs on a GPU have it, so that it is what they compute with."""


def make_material(root: Path, rows: int, *, tied: bool = False, head_dim: int = 16) -> tuple[Path, Path]:
    """Make a model directory and a file of this many chat rows, which is what most runs of the tests need."""
    model = make_tiny_model(root / "model", tied=tied, head_dim=head_dim)
    return model, write_jsonl(root / "chat.jsonl", make_chat_rows(rows, seed=3))
