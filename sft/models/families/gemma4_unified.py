"""Gemma 4 12B: the text model, which images and sound reach without towers."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import gemma4_unified_text
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    return read_language_model(config, gemma4_unified_text.FAMILY)


_VISION = {"patch_size": 2, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32}

FAMILY = Family(
    model_type="gemma4_unified",
    read=_read,
    small_config={"text_config": gemma4_unified_text.FAMILY.small_config, "vision_config": _VISION},
    multimodal=True,
)
