"""The shape of a GGUF model, read from its header through the optional `gguf` package.

A GGUF is only a starting point here: the ranks convert it to a Hugging Face directory once. The shape is wanted
earlier, so that the topology is checked before anything is submitted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.model_shape import ModelShape


def read_gguf_shape(path: Path) -> ModelShape | None:
    """Shape of the model in `path`, or None where `gguf` is not installed: the ranks check it then."""
    try:
        from gguf import GGUFReader
    except ImportError:
        return None
    try:
        reader = GGUFReader(path)
    except (OSError, ValueError, IndexError) as error:
        raise ModelError(f"model.path: {path} is not a readable GGUF file ({error})") from None
    architecture = _value(reader, "general.architecture") or ""
    names = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "context_length",
    }
    config = {ours: _value(reader, f"{architecture}.{theirs}") for ours, theirs in names.items()}
    if config["vocab_size"] is None:  # optional in the format; the token list always tells
        tokens = reader.get_field("tokenizer.ggml.tokens")
        config["vocab_size"] = len(tokens.data) if tokens is not None else None
    tied = not any(tensor.name == "output.weight" for tensor in reader.tensors)
    return ModelShape.from_config({**config, "model_type": architecture, "tie_word_embeddings": tied}, str(path))


def _value(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()
