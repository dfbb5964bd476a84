"""Read a model's sizes from the header of a GGUF file.

`sft prepare` converts a GGUF file to a Hugging Face directory, but its sizes are needed earlier, to check the topology
before anything is submitted. Rejected: the gguf package's reader, which takes seconds because it makes an array of each
of the tokenizer's 100,000 strings.

Source of the format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract.errors import ModelError
from launcher.contract.model_shape import ModelShape

_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9  # type numbers, like the keys of _NUMBERS
_VERSIONS = (2, 3)
_OURS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "context_length",
}


def read_gguf_shape(path: Path) -> ModelShape:
    """Return the sizes of the model in a GGUF file, or raise ModelError."""
    values, tensors = read_gguf_header(path)
    architecture = values.get("general.architecture") or ""
    config = {ours: values.get(f"{architecture}.{theirs}") for ours, theirs in _OURS.items()}
    if config["vocab_size"] is None:  # optional in the format, unlike the list of tokens
        config["vocab_size"] = len(values.get("tokenizer.ggml.tokens", ())) or None
    tied = "output.weight" not in tensors
    return ModelShape.from_config({**config, "model_type": architecture, "tie_word_embeddings": tied}, str(path))


def read_gguf_header(path: Path) -> tuple[dict[str, Any], set[str]]:
    """Return the metadata of a GGUF file by key and the names of its tensors, or raise ModelError.

    Of a list of texts only the length is right.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).read()
    except (OSError, ValueError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise ModelError(f"model.path: {path} is not a readable GGUF file ({error})") from None


@dataclass(slots=True)
class _Header:
    """Reads values one after another, starting at byte `at`. Raises struct.error at the end of the file."""

    data: mmap.mmap
    at: int = 0

    def read(self) -> tuple[dict[str, Any], set[str]]:
        """Return the metadata by key and the names of the tensors."""
        magic, version, tensors, pairs = self.numbers("4sIQQ")
        if magic != b"GGUF" or version not in _VERSIONS:
            raise ValueError(f"it starts with {magic!r} and version {version}, not with GGUF and 2 or 3")
        values = {self.text(): self.value(*self.numbers("I")) for _ in range(pairs)}
        return values, set(self.tensors(tensors))

    def tensors(self, count: int) -> Iterator[str]:
        for _ in range(count):
            yield self.text()
            (dimensions,) = self.numbers("I")
            self.numbers(f"{dimensions}QIQ")  # sizes, type, offset

    def value(self, kind: int) -> Any:
        """Read a number, a text or a list.

        Of a list of texts only the length is right: its texts are empty, because reading them takes long.
        """
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.numbers(_NUMBERS[kind])[0]
        item, count = self.numbers("IQ")
        if item == _STRING:
            self.skip_texts(count)
            return [""] * count
        if item == _ARRAY:
            return [self.value(item) for _ in range(count)]
        return list(self.numbers(f"{count}{_NUMBERS[item]}"))

    def text(self) -> str:
        (length,) = self.numbers("Q")
        return bytes(self.numbers(f"{length}s")[0]).decode("utf-8", errors="replace")

    def skip_texts(self, count: int) -> None:
        read, at = struct.Struct("<Q").unpack_from, self.at
        for _ in range(count):
            at += 8 + read(self.data, at)[0]
        self.at = at

    def numbers(self, form: str) -> tuple[Any, ...]:
        """Read little-endian numbers by a format of `struct`."""
        form = f"<{form}"
        values = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return values
