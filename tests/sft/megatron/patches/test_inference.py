"""Core attention over a cache of keys and values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import sft.megatron.core  # noqa: F401  (makes megatron.core importable for the patch)
from sft.megatron.patches.inference import CachedAttention


class _Causal(nn.Module):
    """Core attention as training has it: as many queries as keys, each sees those up to its own place."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return mixed.permute(2, 0, 1, 3).flatten(2)


def test_one_query_sees_all_cached_keys() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(5, 2, 3, 4, generator=generator) for _ in range(3))
    attention = CachedAttention(_Causal(), None)
    whole = attention(query, key, value)
    assert attention(query[-1:], key, value)[0].numpy() == pytest.approx(whole[-1].numpy(), abs=1e-6)
    # Training's attention takes the single query for the first place, which sees only the first key.
    assert _Causal()(query[-1:], key, value)[0].numpy() != pytest.approx(whole[-1].numpy(), abs=1e-3)
