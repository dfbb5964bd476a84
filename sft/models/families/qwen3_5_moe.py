"""Qwen3.5 and 3.6 with experts: their text model with a vision tower before it."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import qwen3_5, qwen3_5_moe_text
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    return read_language_model(config, qwen3_5_moe_text.FAMILY)


FAMILY = Family(
    model_type="qwen3_5_moe",
    read=_read,
    small_config={**qwen3_5.FAMILY.small_config, "text_config": qwen3_5_moe_text.FAMILY.small_config},
    multimodal=True,
    tied_by_default=False,
)
