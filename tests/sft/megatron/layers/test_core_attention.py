"""Core attention over a cache of keys and values, its scale, window and cap."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft.megatron.core import AttnMaskType, TransformerConfig
from sft.megatron.layers.core_attention import CoreAttention
from sft.megatron.layers.packed_rows import packed_sequences


def core_attention(**own: float | None) -> CoreAttention:
    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=3)
    return CoreAttention(config, 1, AttnMaskType.causal, "self", **own).eval()


def drawn() -> tuple[torch.Tensor, ...]:
    """Query, key and value, [s, b, heads, dim]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 2, 3, 4, generator=generator) for _ in range(3))


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("own", [{}, {"window": 2}, {"window": 2, "softcap": 0.5}, {"softcap": 0.5}], ids=str)
def test_few_queries_are_the_last_positions(own: dict[str, float], last: int) -> None:
    query, key, value = drawn()
    attention = core_attention(**own)
    whole = attention(query, key, value, None)
    assert attention(query[-last:], key, value, None).numpy() == pytest.approx(whole[-last:].numpy(), abs=1e-6)


def test_a_layers_own_scale() -> None:
    query, key, value = drawn()
    by_head = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    expected = F.scaled_dot_product_attention(*by_head, is_causal=True, scale=0.21).permute(2, 0, 1, 3).flatten(2)
    assert torch.equal(core_attention(scale=0.21)(query, key, value, None), expected)
    assert not torch.equal(core_attention()(query, key, value, None), expected)


@pytest.mark.parametrize("packed", [False, True])
def test_a_window_is_what_each_token_sees(packed: bool) -> None:
    """Of its own sequence: exactly what is further back, or in the sequence before, changes nothing."""
    query, key, value = (tensor[:, :1] for tensor in drawn())
    row = packed_sequences(torch.tensor([0, 1, 5], dtype=torch.int32), (1, 4)) if packed else None
    attention = core_attention(window=2)

    def attend(key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        tensors = (query, key, value)
        own = [tensor[:, 0] for tensor in tensors] if packed else tensors
        return attention(*own, None, packed_seq_params=row).view(5, -1)

    whole = attend(key, value)
    for place in range(5):
        other_key, other_value = key.clone(), value.clone()
        other_key[place] += 1
        other_value[place] += 1
        changed = (attend(other_key, other_value) != whole).any(dim=1).nonzero().flatten().tolist()
        inside = range(place, min(place + 2, 1 if packed and place == 0 else 5))
        assert changed == list(inside)


def test_a_window_as_wide_as_the_row_is_none() -> None:
    tensors = drawn()
    assert torch.equal(core_attention(window=5)(*tensors, None), core_attention()(*tensors, None))
    assert not torch.equal(core_attention(window=4)(*tensors, None), core_attention()(*tensors, None))


def test_a_high_cap_changes_little_and_a_low_one_much() -> None:
    tensors = drawn()
    plain = core_attention()(*tensors, None)
    torch.testing.assert_close(core_attention(softcap=1e3)(*tensors, None), plain, atol=1e-5, rtol=0)
    assert (core_attention(softcap=0.1)(*tensors, None) - plain).abs().max() > 0.1
