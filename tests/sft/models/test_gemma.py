"""Gemma 2 and 3 as their published configs have them; keys that change numbers are read or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.contract.model_shape import named_model_config, named_model_shape
from sft.models.architecture import Attention
from sft.models.registry import read_architecture
from sft.models.rope import Rope
from tests.sft.models.test_architecture import refusal, windows, write_config

SIZES: dict[str, Any] = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 2, "num_attention_heads": 4}
GEMMA2: dict[str, Any] = {**SIZES, "model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3: dict[str, Any] = {
    **GEMMA2,
    "model_type": "gemma3_text",
    "num_hidden_layers": 8,
    "query_pre_attn_scalar": 168,
    "sliding_window": 512,
}
EVERYWHERE, IN_WINDOW = Rope(theta=1000000.0), Rope(theta=10000.0)
ROPES: dict[str, tuple[dict[str, Any], Rope]] = {
    # name: (keys of the config, positions of the layers that see everything)
    "left out": ({}, EVERYWHERE),
    "two thetas": ({"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": None}, EVERYWHERE),
    "scaled": (
        {"rope_theta": 1e6, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
        Rope(theta=1e6, factor=8.0),
    ),
    "by kind": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        Rope(theta=1e6, factor=8.0),
    ),
}


def test_gemma2(tmp_path: Path) -> None:
    gemma = read_architecture(write_config(tmp_path, **GEMMA2, query_pre_attn_scalar=144))

    assert gemma.layers[0].attention == Attention(window=4096, softmax_scale=144**-0.5, score_softcap=50.0)
    assert windows(gemma) == [4096, None] * 2
    assert all(layer.norm_before and layer.norm_after for layer in gemma.layers)
    assert (gemma.norm, gemma.logits_softcap, gemma.rope) == ("zero_centered_rms", 30.0, IN_WINDOW)
    assert (gemma.embedding_multiplier, gemma.embedding_multiplier_is_rounded) == (8.0, True)
    assert gemma.shape.tied_embeddings


def test_gemma2_without_caps(tmp_path: Path) -> None:
    """A cap of null is none; a cap left out is the default."""
    caps = {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    gemma = read_architecture(write_config(tmp_path, **GEMMA2, **caps))
    assert (gemma.attentions[0].score_softcap, gemma.logits_softcap) == (None, None)


@pytest.mark.parametrize("name", ROPES)
def test_gemma3(name: str, tmp_path: Path) -> None:
    keys, everywhere = ROPES[name]
    gemma = read_architecture(write_config(tmp_path, **GEMMA3, **keys))

    in_window = Attention(rope=IN_WINDOW, window=512, qk_norm=True, softmax_scale=168**-0.5)
    seeing_all = Attention(qk_norm=True, softmax_scale=168**-0.5)
    assert [layer.attention for layer in gemma.layers] == [in_window] * 5 + [seeing_all] + [in_window] * 2
    assert (gemma.rope, gemma.ropes, gemma.logits_softcap) == (everywhere, (everywhere, IN_WINDOW), None)
    assert all(layer.norm_before and layer.norm_after for layer in gemma.layers)


def test_an_earlier_files_pattern(tmp_path: Path) -> None:
    gemma = read_architecture(write_config(tmp_path, **GEMMA3, sliding_window_pattern=3))
    assert windows(gemma) == [512, 512, None, 512, 512, None, 512, 512]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported for model type gemma3_text",
        ),
        (
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping 50.0 is not supported for model type gemma3_text",
        ),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping 0 is not above 0"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar 0 is not above 0"),
        ({"sliding_window": None}, "7 of 8 layers have a sliding window, and sliding_window is None"),
        ({"sliding_window": 0}, "7 of 8 layers have a sliding window, and sliding_window is 0"),
        ({"sliding_window_pattern": 2.5}, "sliding_window_pattern 2.5 is not a whole number"),
        ({"hidden_activation": "silu"}, "hidden_activation 'silu' is not supported; only 'gelu_pytorch_tanh'"),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        (
            {"layer_types": ["full_attention", "chunked_attention"] * 4},
            "layer_types has 'chunked_attention'; only full_attention and sliding_attention are supported",
        ),
        (
            # Seen to scale, where transformers takes rope_type alone.
            {"rope_scaling": {"type": "linear", "factor": 8.0}},
            "rope_scaling with type: transformers reads rope_type alone in this family, and would not scale",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            "rope_parameters must hold settings for full_attention and for sliding_attention",
        ),
    ],
)
def test_refusals(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    assert refusal(tmp_path, **{**GEMMA3, **changes}) == [message]


@pytest.mark.parametrize("name", ["gemma2-2b", "gemma2-9b", "gemma3-270m", "gemma3-1b", "gemma3-4b"])
def test_named_sizes_are_models_that_are_covered(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(named_model_config(name)))
    architecture = read_architecture(tmp_path)
    assert architecture.shape == named_model_shape(name)
    windowed = tuple(layer for layer, window in enumerate(windows(architecture)) if window is not None)
    assert windowed == architecture.shape.windowed_layers != ()
