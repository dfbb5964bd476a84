"""What a model family is to the rest of the code: one value, `FAMILY`, in one file of `sft.models.families`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader

Config = Mapping[str, object]
"""Keys of a Hugging Face config."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A family whose logits and gradients are proven equal to transformers'."""

    model_type: str
    """Its name in config.json."""
    read: Callable[[ConfigReader], Architecture]
    """Return the architecture that a config describes; what is not covered goes to `ConfigReader.refuse`."""
    small_config: Config
    """A tiny model with every part of the family in it. The tests train, import, export and answer with it; it leaves
    out the vocabulary and the number of positions, which they set."""
    variants: Mapping[str, Config] = field(default_factory=dict)
    """By name: other settings of `small_config` that lead to another architecture or other files."""
    base_prefix: str = ""
    """What names of the base model's tensors begin with, if published files may leave it out."""
    multimodal: bool = False
    """Whether models of this type have other parts beside a language model, whose config is what `read` gets."""
    tied_by_default: bool = True
    """Of a multimodal type: what an absent `tie_word_embeddings` at the top of its config means."""
    nested_names: bool = False
    """Of a language model that is also part of a multimodal one: whether files may have the names that it has there."""
