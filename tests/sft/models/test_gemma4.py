"""Gemma 4's configs: two kinds of layers with heads of their own, and what is not built is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.contract.errors import ModelError
from launcher.contract.head_sizes import HeadSizes
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec
from sft.hf.trained_routers import router_problems
from sft.models.architecture import Attention, Experts, SharedExpert
from sft.models.registry import read_architecture
from sft.models.rope import PROPORTIONAL, Rope
from tests.sft.models.test_architecture import refusal, windows, write_config

GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 97,
    "hidden_size_per_layer_input": 0,
}
WIDE: dict[str, Any] = {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "global_head_dim": 32}
SLIDING, FULL = "sliding_attention", "full_attention"
ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def test_two_kinds_of_layers(tmp_path: Path) -> None:
    found = read_architecture(write_config(tmp_path, **GEMMA4, **WIDE))

    common: dict[str, Any] = {"qk_norm": True, "value_norm": True, "softmax_scale": 1.0}
    in_window = Attention(rope=Rope(theta=1e4), window=512, **common)
    heads = HeadSizes(head_dim=32, query_groups=2, keyed_values=True)
    everywhere = Rope(theta=1e6, fraction=0.25, proportional=True)
    seeing_all = Attention(heads=heads, rope=everywhere, **common)
    expected = [in_window] * 5 + [seeing_all, in_window, seeing_all]  # the last one sees all positions, too
    assert [layer.attention for layer in found.layers] == expected
    assert found.shape.windowed_layers == (0, 1, 2, 3, 4, 6)
    assert found.rotations == ((Rope(theta=1e4), 16), (everywhere, 32))
    assert all(layer.norm_before and layer.norm_after and layer.scaled for layer in found.layers)
    assert (found.norm, found.embedding_multiplier, found.logits_softcap) == ("late_rounded_rms", 8.0, None)


@pytest.mark.parametrize(
    ("keys", "heads"),
    [
        ({}, HeadSizes(head_dim=512, query_groups=4)),
        # Their number counts with shared projections alone.
        ({**WIDE, "attention_k_eq_v": False}, HeadSizes(head_dim=32, query_groups=4)),
        ({"attention_k_eq_v": True}, HeadSizes(head_dim=512, query_groups=4, keyed_values=True)),
        # As transformers writes them: no other key counts then.
        (
            {**WIDE, "per_layer_config": {str(layer): {"head_dim": 24} for layer in (5, 7)}},
            HeadSizes(head_dim=24, query_groups=4, keyed_values=True),
        ),
        ({"per_layer_config": {}}, HeadSizes(head_dim=16, query_groups=4)),
    ],
)
def test_heads_of_layers_that_see_all(keys: dict[str, Any], heads: HeadSizes, tmp_path: Path) -> None:
    """The same sizes as transformers finds in the same file."""
    from transformers import AutoConfig

    shape = read_architecture(write_config(tmp_path, **{**GEMMA4, **keys})).shape
    assert shape.wide_heads == heads
    theirs = AutoConfig.from_pretrained(tmp_path).per_layer_config[5]
    assert (theirs.head_dim, theirs.num_key_value_heads) == (heads.head_dim, heads.query_groups)
    own = shape.for_layers(windowed=False)
    assert (own.head_dim, own.num_query_groups, own.keyed_values) == (
        heads.head_dim,
        heads.query_groups,
        heads.keyed_values,
    )
    usual = shape.for_layers(windowed=True)
    assert (usual.head_dim, usual.num_query_groups, usual.keyed_values) == (16, 4, False)


@pytest.mark.parametrize(
    "stated",
    [
        {"5": {"head_dim": 24}},  # and nothing for layer 7
        {"0": {"head_dim": 24}, "5": {"head_dim": 24}, "7": {"head_dim": 24}},
        {"5": {"head_dim": 24}, "7": {"head_dim": 32}},
        {"5": {"intermediate_size": 24}, "7": {"intermediate_size": 24}},
        {"5": {"skip": ["mlp"]}, "7": {"skip": ["mlp"]}},
        {"five": {"head_dim": 24}},
    ],
)
def test_other_layers_of_their_own_are_refused(stated: dict[str, Any]) -> None:
    with pytest.raises(
        ModelError, match=r"per_layer_config (is supported where it gives all layers without|must hold)"
    ):
        ModelShape.from_config({**GEMMA4, "per_layer_config": stated}, "here")


@pytest.mark.parametrize("key", ["global_head_dim", "num_global_key_value_heads"])
def test_a_size_that_is_no_number(key: str) -> None:
    with pytest.raises(ModelError, match="'many' of layers without a window is not a whole number above 0"):
        ModelShape.from_config({**GEMMA4, **WIDE, key: "many"}, "here")


def test_the_last_layer_sees_all(tmp_path: Path) -> None:
    found = read_architecture(write_config(tmp_path, **GEMMA4, layer_types=[SLIDING] * 8, sliding_window=9))
    assert windows(found) == [9] * 7 + [None]
    assert found.shape.windowed_layers == tuple(range(7))


@pytest.mark.parametrize("size", [24, 32, 512])
@pytest.mark.parametrize(
    "settings", [{"partial_rotary_factor": 0.25}, {"partial_rotary_factor": 0.3, "factor": 8.0}, {}]
)
def test_a_part_of_the_pairs_rotates_as_in_transformers(settings: dict[str, Any], size: int, tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding

    rope = {**ROPES, FULL: {"rope_type": "proportional", "rope_theta": 3e5, **settings}}
    directory = write_config(tmp_path, **GEMMA4, global_head_dim=size, rope_parameters=rope)
    theirs = Gemma4TextRotaryEmbedding(AutoConfig.from_pretrained(directory))
    own, head_dim = read_architecture(directory).rotations[1]
    found = own.inverse_frequencies(head_dim)
    assert torch.equal(found, theirs.full_attention_inv_freq)
    assert len(found) == own.pairs(head_dim) == size // 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size_per_layer_input": 256},
            "hidden_size_per_layer_input 256 is not supported: embeddings of each layer (Gemma 4 E2B and E4B) are not "
            "built; only 0",
        ),
        (
            {"num_kv_shared_layers": 2},
            "num_kv_shared_layers 2 is not supported: no layer takes the keys of another; only 0",
        ),
        ({"attention_bias": True}, "attention_bias true is not supported"),
        (
            {"use_bidirectional_attention": "all"},
            "use_bidirectional_attention 'all' is not supported; tokens see those before them",
        ),
        ({"layer_types": [SLIDING, FULL] * 5}, "layer_types has 10 entries for 8 layers"),
        (
            {"rope_parameters": {FULL: ROPES[FULL]}},
            f"rope_parameters has no settings with a rope_theta for {SLIDING}; it must hold them for either kind",
        ),
        (
            {"rope_parameters": {**ROPES, SLIDING: {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}},
            "rope_type 'linear' is not supported for gemma4_text; only 'default' or 'proportional'",
        ),
        (
            {"rope_parameters": {**ROPES, FULL: {**ROPES[FULL], "partial_rotary_factor": 1.5}}},
            "partial_rotary_factor 1.5 is not from 0 to 1",
        ),
        (
            {"rope_parameters": {**ROPES, FULL: {**ROPES[FULL], "factor": 0.0}}},
            f"rope_type {PROPORTIONAL!r} with factor 0.0, which is not above 0",
        ),
        ({"rope_theta": 1e5}, "rope_theta 100000.0 is not supported here; rope_parameters state it for each kind"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping 0 is not above 0"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert refusal(tmp_path, **{**GEMMA4, **changes}) == [message]


def test_embeddings_of_each_layer_are_the_default(tmp_path: Path) -> None:
    config = {key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="hidden_size_per_layer_input 256 is not supported"):
        read_architecture(tmp_path)


EXPERTS = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 3, "moe_intermediate_size": 24}


def test_experts_beside_the_mlp(tmp_path: Path) -> None:
    found = read_architecture(write_config(tmp_path, **GEMMA4, **EXPERTS))
    (mlp,) = {layer.mlp for layer in found.layers}
    assert mlp == Experts(
        count=8, chosen=3, width=24, normalized=True, shared=SharedExpert(width=96, weighted=False), beside_mlp=True,
        scaled_router=True, activation="gelu_tanh",
    )  # fmt: skip
    assert found.shape.joined_experts
    assert found.shape.layer_norms == 7
    switched_off = {**EXPERTS, "enable_moe_block": False}
    assert read_architecture(write_config(tmp_path, **GEMMA4, **switched_off)).shape.num_experts == 0


def test_the_model_without_towers_has_no_experts(tmp_path: Path) -> None:
    """Nor has transformers', whatever its config says. Seen to build them."""
    unified = {**GEMMA4, **EXPERTS, "model_type": "gemma4_unified_text"}
    assert refusal(tmp_path, **unified) == ["enable_moe_block true is not supported"]
    read_architecture(write_config(tmp_path, **{**unified, "enable_moe_block": False}))


@pytest.mark.parametrize("key", ["num_experts", "top_k_experts", "moe_intermediate_size"])
def test_experts_without_a_size(key: str, tmp_path: Path) -> None:
    message = f"{key} None is not a number"
    assert message in refusal(tmp_path, **{**GEMMA4, **EXPERTS, key: None})


def test_their_routers_are_not_trained_beside_adapters(tmp_path: Path) -> None:
    found = read_architecture(write_config(tmp_path, **GEMMA4, **EXPERTS))
    (problem,) = router_problems(LoraSpec(rank=4, router=True), found)
    assert problem.startswith("model.lora.router: routers of a gemma4_text model have further weights")


def test_tokens_of_images_do_not_matter_here(tmp_path: Path) -> None:
    """Those of "vision" see each other; text sees what is before it."""
    found = read_architecture(write_config(tmp_path, **GEMMA4, use_bidirectional_attention="vision"))
    assert found == read_architecture(write_config(tmp_path, **GEMMA4))


def test_the_unified_model_differs_in_what_is_left_out(tmp_path: Path) -> None:
    config = {key: value for key, value in GEMMA4.items() if key not in ("hidden_size_per_layer_input", "model_type")}
    found = read_architecture(write_config(tmp_path, **config, model_type="gemma4_unified_text"))
    assert windows(found) == [1024] * 5 + [None, 1024, None]
    assert found.shape.window == 1024
