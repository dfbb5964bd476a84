"""The layouts: against the formulas they stand for, bit-exact both ways, and the same rows whatever the rank count."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from launcher.contract.latent_attention import LatentAttention
from launcher.contract.model_shape import ModelShape
from launcher.contract.model_types import facts_of
from sft.models.architecture import Architecture
from sft.models.config_reader import ConfigReader
from sft.models.registry import SUPPORTED
from sft.models.registry import family as families
from sft.models.weight_map import (
    EMBEDDING,
    OUTPUT,
    ParameterMap,
    RankPlace,
    canonical_name,
    checkpoint_key,
    rank_part,
    rank_pieces,
    split_parameter,
)

LATENTS = LatentAttention(query_rank=5, key_rank=3, plain_dim=2, rotary_dim=2, value_dim=3)


def architecture(family: str = "qwen2", heads: int = 6, groups: int = 3, tied: bool = False) -> Architecture:
    """A model of two layers: llama is plain, qwen2 has biases, qwen3 norms, phi3 joined tensors.

    Dense families read nothing of experts.
    """
    shape = ModelShape(
        model_type=family,
        num_layers=2,
        hidden_size=8,
        ffn_hidden_size=12,
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=4,
        vocab_size=11,
        max_position_embeddings=64,
        tied_embeddings=tied,
        num_experts=4,
        experts_per_token=2,
        expert_ffn_hidden_size=6,
        latent=LATENTS if facts_of(family).attention == "latent" else None,
    )
    return families(family).read(ConfigReader({}, shape))


def merge_parameter(layout: ParameterMap, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """The whole Megatron-core parameter, without padding, by the layout's own words."""
    parts = []
    for piece in layout.pieces:
        tensor = tensors[piece.name] if piece.expert is None else tensors[piece.name][piece.expert]
        parts.append((tensor.T if layout.transposed else tensor)[piece.start : piece.stop : piece.step])
    return torch.cat(parts)


def hf_tensors(model: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in model.weights.hf_shapes().items()}


def test_qkv_rows_are_grouped_by_kv_head() -> None:
    model = architecture()
    tensors = hf_tensors(model)
    attention = "model.layers.1.self_attn."
    for kind in ("weight", "bias"):
        layout = model.weights[f"decoder.layers.1.self_attention.linear_qkv.{kind}"]
        query, key, value = (tensors[f"{attention}{which}_proj.{kind}"] for which in "qkv")
        by_group = [
            torch.cat(
                [query.unflatten(0, (3, 8))[group], key.unflatten(0, (3, 4))[group], value.unflatten(0, (3, 4))[group]]
            )
            for group in range(3)
        ]
        assert torch.equal(merge_parameter(layout, tensors), torch.cat(by_group))


def test_gate_comes_before_up_and_a_rank_holds_a_part_of_each() -> None:
    model = architecture()
    layout = model.weights["decoder.layers.0.mlp.linear_fc1.weight"]

    assert [(piece.name, piece.start, piece.stop) for piece in rank_pieces(layout, rank=1, size=3, rows=8)] == [
        ("model.layers.0.mlp.gate_proj.weight", 4, 8),
        ("model.layers.0.mlp.up_proj.weight", 4, 8),
    ]


@given(
    groups=st.sampled_from([1, 2, 3, 6]),
    family=st.sampled_from([name for name in SUPPORTED if not families(name).multimodal]),
    tied=st.booleans(),
    padding=st.integers(0, 5),
)
def test_merge_then_split_is_the_identity(groups: int, family: str, tied: bool, padding: int) -> None:
    model = architecture(family, groups=groups, tied=tied)
    tensors = hf_tensors(model)
    found: dict[str, torch.Tensor] = {}
    for layout in model.weights.parameters().values():
        parameter = merge_parameter(layout, tensors)
        if layout.padded:
            parameter = torch.cat([parameter, torch.full((padding, 8), 9.0)])
        found |= split_parameter(layout, parameter)

    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_fused_tensors_hold_the_same_rows() -> None:
    """Phi-3's file has all queries, all keys, all values in one tensor, and all gates, all ups in another."""
    separate, fused = architecture("llama"), architecture("phi3")
    tensors = hf_tensors(separate)
    layer = "model.layers.1."
    joined = {
        f"{layer}self_attn.qkv_proj.weight": [f"{layer}self_attn.{which}_proj.weight" for which in "qkv"],
        f"{layer}mlp.gate_up_proj.weight": [f"{layer}mlp.{which}_proj.weight" for which in ("gate", "up")],
    }
    together = {name: torch.cat([tensors[part] for part in parts]) for name, parts in joined.items()}
    for parameter in ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight"):
        ours, theirs = (model.weights[f"decoder.layers.1.{parameter}"] for model in (separate, fused))
        assert torch.equal(merge_parameter(ours, tensors), merge_parameter(theirs, together))
    assert fused.weights.hf_shapes()[f"{layer}self_attn.qkv_proj.weight"] == (48, 8)


@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_together_hold_every_row_once(size: int, family: str) -> None:
    model = architecture(family, heads=6, groups=3)
    for layout in model.weights.parameters().values():
        if layout.split != 0 or layout.rows % size:
            continue
        ranks = [rank_pieces(layout, rank, size, layout.rows // size) for rank in range(size)]
        assert all(sum(piece.rows for piece in pieces) == layout.rows // size for pieces in ranks)
        rows = [(piece.name, row) for pieces in ranks for piece in pieces for row in range(piece.start, piece.stop)]
        whole = [(piece.name, row) for piece in layout.pieces for row in range(piece.start, piece.stop)]
        assert sorted(rows) == sorted(whole)


@pytest.mark.parametrize(("family", "count"), [("qwen3_moe", 2 * 4 * 3), ("mixtral", 2 * 4 * 3), ("gpt_oss", 2 * 4)])
@pytest.mark.parametrize(("owners", "sharers"), [(1, 1), (2, 1), (4, 1), (1, 3), (2, 2)])
def test_ranks_together_hold_every_number_of_every_expert_once(
    family: str, count: int, owners: int, sharers: int
) -> None:
    """Those of gpt-oss are in tensors of all experts, in which gate and up rows alternate; each sharer has a copy of
    its second bias."""
    model = architecture(family)
    tensors = {name: torch.zeros(shape) for name, shape in model.weights.hf_shapes().items()}
    for layout in model.weights.parameters().values():
        if not layout.experts:
            continue
        rows = layout.rows // owners // (sharers if layout.split == 0 else 1)
        columns_of_rank = [] if layout.columns is None else [layout.columns // (sharers if layout.split == 1 else 1)]
        shape = (rows, *columns_of_rank)
        for owner in range(owners):
            for sharer in range(1 if layout.split is None else sharers):
                place = RankPlace(experts=(owner, owners), expert_tensor=(sharer, sharers))
                pieces, columns = rank_part(layout, place, shape)
                assert sum(piece.rows for piece in pieces) == rows
                for piece in pieces:
                    tensors[piece.name][layout.place(piece, columns)] += 1
    of_experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
    assert len(of_experts) == count
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in of_experts)


def test_more_ranks_than_kv_heads_hold_consecutive_rows() -> None:
    layout = architecture(heads=6, groups=1).weights["decoder.layers.0.self_attention.linear_qkv.weight"]

    assert [[(piece.name[-13], piece.rows) for piece in rank_pieces(layout, rank, 2, 16)] for rank in range(2)] == [
        [("q", 16)],
        [("q", 8), ("k", 4), ("v", 4)],
    ]


def test_vocabulary_padding_goes_to_the_last_ranks() -> None:
    layout = architecture().weights[EMBEDDING]
    rows = [[(piece.start, piece.stop) for piece in rank_pieces(layout, rank, 5, 3)] for rank in range(5)]

    assert rows == [[(0, 3)], [(3, 6)], [(6, 9)], [(9, 11)], []]


def test_a_tied_output_layer_reads_the_embedding() -> None:
    tied, untied = architecture(tied=True), architecture(tied=False)

    assert tied.weights[OUTPUT] == tied.weights[EMBEDDING]
    assert "lm_head.weight" not in tied.weights.hf_shapes()
    assert untied.weights.hf_shapes()["lm_head.weight"] == (11, 8)
    assert OUTPUT not in tied.weights.parameters()


@pytest.mark.parametrize(
    ("name", "offset", "expected"),
    [
        ("decoder.layers.1.input_layernorm.weight", 3, "decoder.layers.4.input_layernorm.weight"),
        ("module.module.decoder.final_layernorm.weight", 3, "decoder.final_layernorm.weight"),
        ("decoder.layers.0.mlp.linear_fc1.layer_norm_weight", 0, "decoder.layers.0.pre_mlp_layernorm.weight"),
    ],
)
def test_canonical_names(name: str, offset: int, expected: str) -> None:
    assert canonical_name(name, offset) == expected


def test_checkpoint_keys_stack_equal_layers() -> None:
    norm = "self_attention.linear_qkv.layer_norm_weight"
    assert checkpoint_key("decoder.layers.7.input_layernorm.weight", stacked=True) == (f"decoder.layers.{norm}", 7)
    assert checkpoint_key("decoder.layers.7.input_layernorm.weight", stacked=False) == (
        f"decoder.layers.7.{norm}",
        None,
    )
    linear = "mlp.linear_fc2.weight"
    assert checkpoint_key(f"decoder.layers.0.{linear}", stacked=True) == (f"decoder.layers.{linear}", 0)
    for stacked in (True, False):
        assert checkpoint_key("decoder.final_layernorm.weight", stacked=stacked) == (
            "decoder.final_layernorm.weight",
            None,
        )


def test_layers_are_stacked_where_they_have_the_same_parameters() -> None:
    equal = architecture("qwen3_moe").weights
    assert equal.stacked
    first, second = equal.layers
    router = dataclasses.replace(second["mlp.router.weight"], columns=9)
    wider = {**second, "mlp.router.weight": router}
    assert not dataclasses.replace(equal, layers=(first, wider)).stacked
    assert not dataclasses.replace(equal, layers=(first, {**second, "mlp.router.bias": router})).stacked


def test_names_of_no_parameter() -> None:
    model = architecture("llama")
    names = (
        "decoder.layers.2.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.final_layernorm.bias",
    )
    assert [model.weights.find(name) for name in names] == [None, None, None]


def test_every_hf_tensor_belongs_to_one_parameter() -> None:
    model = architecture()
    layouts = list(model.weights.parameters().values())
    owners = [{piece.name for piece in layout.pieces} for layout in layouts]

    assert not any(left & right for left, right in itertools.combinations(owners, 2))
