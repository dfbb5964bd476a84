"""Core attention over a cache of keys and values, and its scale."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sft.megatron.core import AttnMaskType, TransformerConfig
from sft.megatron.layers.attention import CoreAttention


def core_attention(scale: float | None = None) -> CoreAttention:
    config = TransformerConfig(num_layers=1, hidden_size=12, num_attention_heads=3)
    return CoreAttention(config, 1, AttnMaskType.causal, "self", scale=scale).eval()


def drawn() -> tuple[torch.Tensor, ...]:
    """Query, key and value, [s, b, heads, dim]."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(5, 2, 3, 4, generator=generator) for _ in range(3))


@pytest.mark.parametrize("last", [1, 3])
def test_few_queries_are_the_last_positions(last: int) -> None:
    query, key, value = drawn()
    attention = core_attention()
    whole = attention(query, key, value, None)
    assert attention(query[-last:], key, value, None).numpy() == pytest.approx(whole[-last:].numpy(), abs=1e-6)


def test_a_layers_own_scale() -> None:
    query, key, value = drawn()
    by_head = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    expected = F.scaled_dot_product_attention(*by_head, is_causal=True, scale=0.21).permute(2, 0, 1, 3).flatten(2)
    assert torch.equal(core_attention(scale=0.21)(query, key, value, None), expected)
    assert not torch.equal(core_attention()(query, key, value, None), expected)
