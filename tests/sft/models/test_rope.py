"""Frequencies are bit for bit those of transformers, with Llama 3's numbers and with others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sft.models.rope import read_rope

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + 0.1 * pair for pair in range(64)],
    "long_factor": [2.0 + 0.5 * pair for pair in range(64)],
    "original_max_position_embeddings": 512,
}


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_type": "default", "rope_theta": 10000.0},
        {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 3.0},
        LLAMA3,
        {**LLAMA3, "low_freq_factor": 1.5, "high_freq_factor": 6.0, "original_max_position_embeddings": 2048},
        YARN,
        {**YARN, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False},
        {**YARN, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 0.5},
        {**YARN, "attention_factor": 1.3},
        {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        LONGROPE,
        {**LONGROPE, "factor": 4.0},
        {**LONGROPE, "attention_factor": 1.2},
    ],
    ids=[
        "default",
        "linear",
        "llama3",
        "llama3 with other numbers",
        "yarn",
        "yarn with other numbers",
        "yarn with mscale",
        "yarn with a stated factor",
        "dynamic",
        "longrope",
        "longrope with a stated factor",
        "longrope with a stated attention factor",
    ],
)
def test_frequencies_equal_transformers(settings: dict[str, Any]) -> None:
    config = LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=2048, rope_parameters=dict(settings)
    )
    rope, problems = read_rope(
        {"rope_parameters": settings}, max_position_embeddings=config.max_position_embeddings, partial=False
    )

    assert problems == []
    assert rope is not None
    theirs = LlamaRotaryEmbedding(config)
    assert torch.equal(rope.inverse_frequencies(128), theirs.inv_freq)
    assert rope.attention_factor == pytest.approx(theirs.attention_scaling, rel=1e-12)
    assert rope.longest == {"dynamic": 2048, "longrope": 512}.get(settings["rope_type"])


def test_a_part_of_each_head() -> None:
    rope, _ = read_rope({"partial_rotary_factor": 0.75}, max_position_embeddings=64, partial=True)
    assert rope is not None
    assert rope.inverse_frequencies(16).shape == (6,)


def test_yarn_in_the_form_of_earlier_files() -> None:
    """As Qwen2.5's model card gives it, for contexts beyond the 32,768 positions of its first training."""
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    old = {"rope_theta": 1e6, "rope_scaling": scaling}
    found, _ = read_rope(old, max_position_embeddings=32768, partial=False)
    expected, _ = read_rope({"rope_parameters": YARN}, max_position_embeddings=131072, partial=False)
    assert found == expected is not None
