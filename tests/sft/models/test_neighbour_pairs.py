"""Rotating rows that were moved apart is what the files' own order means."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sft.kernels.rope import rotate
from sft.models.llama_like import QKV
from sft.models.registry import family, read_architecture
from sft.models.weight_map import ParameterMap
from tests.sft.hf_cases import OUTER

HEADS, GROUPS, DIM = 6, 3, 16


def rows_of(part: ParameterMap, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[piece.name][part.place(piece)] for piece in part.pieces])


@pytest.mark.parametrize("fraction", [0.5, 0.75, 1.0])
def test_queries_and_keys_rotate_as_in_transformers(fraction: float, tmp_path: Path) -> None:
    from transformers.models.glm4.modeling_glm4 import apply_rotary_pos_emb

    config = {**family("glm4").small_config, **OUTER, "model_type": "glm4", "partial_rotary_factor": fraction}
    (tmp_path / "config.json").write_text(json.dumps(config))
    part = read_architecture(tmp_path).weights.layers[0][QKV]
    counts = {"q": HEADS, "k": GROUPS, "v": GROUPS}
    tensors = {
        f"model.layers.0.self_attn.{name}_proj.weight": torch.randn(count * DIM, 48) for name, count in counts.items()
    }
    x, angles = torch.randn(48), torch.randn(1, int(DIM * fraction) // 2)

    query, key = (tensors[f"model.layers.0.self_attn.{name}_proj.weight"] @ x for name in "qk")
    cos, sin = (torch.cat([table, table], dim=-1)[None] for table in (angles.cos(), angles.sin()))
    theirs = apply_rotary_pos_emb(query.view(1, HEADS, 1, DIM), key.view(1, GROUPS, 1, DIM), cos, sin)
    their_query, their_key = (heads.view(-1, DIM) for heads in theirs)

    heads = (rows_of(part, tensors) @ x).view(GROUPS, HEADS // GROUPS + 2, DIM)
    ours = rotate(heads[:, :-1], angles.cos(), angles.sin())
    scores = torch.einsum("ghd,gd->gh", ours[:, :-1], ours[:, -1])
    expected = torch.einsum("ghd,gd->gh", their_query.view(GROUPS, -1, DIM), their_key)
    assert torch.allclose(scores, expected, atol=1e-4)
    values = tensors["model.layers.0.self_attn.v_proj.weight"] @ x
    assert torch.allclose(heads[:, -1].flatten(), values, atol=1e-5)
