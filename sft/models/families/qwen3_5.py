"""Qwen3.5 and 3.6 (dense): their text model with a vision tower before it."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import qwen3_5_text
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    return read_language_model(config, qwen3_5_text.FAMILY)


SMALL_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
"""A tiny vision tower."""

FAMILY = Family(
    model_type="qwen3_5",
    read=_read,
    small_config={
        "text_config": qwen3_5_text.FAMILY.small_config,
        "vision_config": {**SMALL_VISION, "out_hidden_size": 48},
        "tie_word_embeddings": False,
    },
    multimodal=True,
    tied_by_default=False,
)
