"""Gemma 4 (26B-A4B, 31B): the text model with towers for images and sound before it."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import gemma4_text
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    return read_language_model(config, gemma4_text.FAMILY)


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": 4,
    "position_embedding_size": 16,
}

FAMILY = Family(
    model_type="gemma4",
    read=_read,
    small_config={"text_config": gemma4_text.FAMILY.small_config, "vision_config": _VISION},
    multimodal=True,
)
