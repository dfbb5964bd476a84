"""What a GGUF file says that transformers' reader passes over: other settings of the model, and how words are split.

The reader maps the keys that it knows, and leaves the others be. A file with a scaled RoPE would be trained unscaled,
and one whose words it splits as GPT-2 does, because it does not know the name of the right way, on other tokens than
the model has seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from launcher.contract.model_shape import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metadata = Mapping[str, object]
"""Values by key, as the file has them."""

_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size", "rope.freq_base"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
)
_OF_HEADS = ("rope.dimension_count", "attention.key_length", "attention.value_length")
_MEAN_NOTHING: Mapping[str, tuple[object, ...]] = {
    "attention.causal": (True,),
    "attention.scale": (0.0,),
    "attention.sliding_window": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scale_linear": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.factor": (0.0, 1.0),
    "rope.scaling.type": ("none",),
}
"""Values with which a key changes no number."""
_NOTES = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")
"""Keys that change no number by themselves."""

_AS_GPT2 = (None, "default", "gpt-2", "gpt2", "mpt", "olmo", "phi-2")
"""Names of a split for which GPT-2's is right; None is that of older files, which state none."""
_DIGITS_APART = ("command-r", "exaone", "refact", "smollm", "starcoder")
"""Names of the split that puts each digit apart and then does as GPT-2's."""


def unread_settings(metadata: Metadata, shape: ModelShape) -> Iterator[str]:
    """Yield each setting of the model that nobody reads and that changes numbers, with its value."""
    prefix = f"{metadata.get('general.architecture')}."
    for name, value in metadata.items():
        key = name.removeprefix(prefix)
        if not name.startswith(prefix) or key in _READ or key in _NOTES or value in _MEAN_NOTHING.get(key, ()):
            continue
        if key not in _OF_HEADS or value != shape.head_dim:
            yield f"{name} {value}"


def split_as_stated(tokenizer: PreTrainedTokenizerBase, metadata: Metadata) -> str | None:
    """Let a byte-level tokenizer split words as the file says. Return the name of an unknown way, else None."""
    from tokenizers import pre_tokenizers

    stated = metadata.get("tokenizer.ggml.pre")
    if metadata.get("tokenizer.ggml.model") != "gpt2" or stated in _AS_GPT2:
        return None
    backend = tokenizer.backend_tokenizer
    if stated in _DIGITS_APART:
        parts = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(parts)
        return None
    return None if "Split(" in str(backend.pre_tokenizer) else str(stated)  # transformers knows it
