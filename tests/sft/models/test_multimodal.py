"""Configs of multimodal models: what they leave out means what transformers means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sft.models.registry import read_architecture
from tests.sft.models.test_architecture import shape_free_of_positions

GEMMA3_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text",
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
}
"""As the hub has it: heads, their sizes and the vocabulary are transformers' defaults."""
MISTRAL_SMALL = {
    "architectures": ["Mistral3ForConditionalGeneration"],
    "model_type": "mistral3",
    "text_config": {
        "model_type": "mistral",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 5120,
        "intermediate_size": 32768,
        "max_position_embeddings": 131072,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000000.0,
        "sliding_window": None,
        "vocab_size": 131072,
    },
}


@pytest.mark.parametrize("config", [GEMMA3_4B, MISTRAL_SMALL], ids=["gemma3", "mistral3"])
def test_published_configs(config: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoConfig

    written, filled = tmp_path / "written", tmp_path / "filled"
    for directory in (written, filled):
        directory.mkdir()
    (written / "config.json").write_text(json.dumps(config))
    AutoConfig.from_pretrained(written).save_pretrained(filled)
    found = read_architecture(written)
    assert shape_free_of_positions(found) == shape_free_of_positions(read_architecture(filled))
    assert found.shape.hidden_size == config["text_config"]["hidden_size"]
