"""Mistral Small 3.1 and later, Devstral 2, Ministral 3: a Mistral or Ministral 3 that can be shown images."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import ministral3, mistral
from sft.models.family import Family
from sft.models.multimodal import read_language_model


def _read(config: ConfigReader) -> Architecture:
    return read_language_model(config, mistral.FAMILY, ministral3.FAMILY)


_VISION = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 16,
    "image_size": 28,
    "patch_size": 14,
}
_MINISTRAL3 = {**ministral3.FAMILY.small_config, "model_type": "ministral3"}

FAMILY = Family(
    model_type="mistral3",
    read=_read,
    small_config={
        "text_config": {**mistral.FAMILY.small_config, "model_type": "mistral", "head_dim": 16},
        "vision_config": _VISION,
        "tie_word_embeddings": False,
    },
    variants={"ministral3": {"text_config": _MINISTRAL3, "tie_word_embeddings": True}},
    multimodal=True,
)
