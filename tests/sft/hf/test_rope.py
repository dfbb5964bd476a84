"""Frequencies are bit for bit those of transformers, with Llama 3's numbers and with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sft.hf.rope import read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 3.0},
        LLAMA3,
        {**LLAMA3, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 2048},
    ],
    ids=["default", "linear", "llama3", "llama3 with other numbers"],
)
def test_frequencies_equal_transformers(settings: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=256, num_attention_heads=2, rope_parameters=dict(settings))
    rope, problems = read_rope(
        {"rope_parameters": settings}, max_position_embeddings=config.max_position_embeddings, partial=False
    )

    assert problems == []
    assert rope is not None
    assert torch.equal(rope.inverse_frequencies(128), LlamaRotaryEmbedding(config).inv_freq)


def test_a_part_of_each_head() -> None:
    rope, _ = read_rope({"partial_rotary_factor": 0.75}, max_position_embeddings=64, partial=True)
    assert rope is not None
    assert rope.inverse_frequencies(16).shape == (6,)
