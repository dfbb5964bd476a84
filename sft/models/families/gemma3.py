"""Gemma 3 from 4B on: the text model with an image tower before it."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import gemma3_text
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    if config.values.get("final_logit_softcapping"):
        config.refuse(
            "final_logit_softcapping is not supported beside images: transformers caps the text model's logits alone"
        )
    return read_language_model(config, gemma3_text.FAMILY)


_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

FAMILY = Family(
    model_type="gemma3",
    read=_read,
    small_config={
        "text_config": gemma3_text.FAMILY.small_config,
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    },
    multimodal=True,
)
