"""The language model of Gemma 4 12B: Gemma 4's, with other values where a config states none."""

from __future__ import annotations

from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.families import gemma4_text
from sft.models.family import Family


def _read(config: ConfigReader) -> Architecture:
    config.refuse_true("enable_moe_block")  # transformers does not read it in this type, and builds no experts
    return gemma4_text.read_two_kinds(config, window=1024, layer_inputs=0)


FAMILY = Family(
    model_type="gemma4_unified_text",
    read=_read,
    small_config={
        key: value for key, value in gemma4_text.FAMILY.small_config.items() if key != "hidden_size_per_layer_input"
    },
)
