"""Random weights: norms of every kind change no size, and a seed is a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.megatron.initial_weights import RandomWeights
from sft.models.registry import read_architecture
from tests.sft.hf_cases import save_config


@pytest.mark.parametrize(("case", "norm"), [("llama", 1.0), ("gemma", 0.0), ("qwen3_5_text", 0.0)])
def test_norms_change_no_size(case: str, norm: float, tmp_path: Path) -> None:
    """Those that multiply by 1 + weight are 0; those of linear attention, in the same model, are 1."""
    architecture = read_architecture(save_config(case, tmp_path))
    source, shapes = RandomWeights.of(architecture, 1), architecture.weights.hf_shapes()
    norms = {name: source.tensor(name, shape) for name, shape in shapes.items() if name.endswith("norm.weight")}
    gated = {name for name in norms if ".linear_attn." in name}
    assert len(gated) == len(architecture.shape.linear_layers)
    for name, weight in norms.items():
        assert set(weight.tolist()) == {1.0 if name in gated else norm}, name
    matrix = "model.layers.0.mlp.down_proj.weight"
    again = RandomWeights.of(architecture, 1).tensor(matrix, shapes[matrix])
    other = RandomWeights.of(architecture, 2).tensor(matrix, shapes[matrix])
    assert source.tensor(matrix, shapes[matrix]).equal(again) and not again.equal(other)
