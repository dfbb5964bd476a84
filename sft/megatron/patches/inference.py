"""Megatron-core's modules as inference with a cache of keys and values needs them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch.nn.functional as F
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from sft.megatron.patches.patch import Patch

_SEQUENCE_PARALLEL = ("sequence_parallel", "scatter_to_sequence_parallel", "reduce_scatter_embeddings")
"""Attributes by which Megatron-core's modules split a sequence over tensor parallel ranks."""


class CachedAttention(nn.Module):
    """Core attention that also serves a single query behind a cache of keys, all of which it may see."""

    def __init__(self, inner: nn.Module, scale: float | None) -> None:
        super().__init__()
        self._inner = inner
        self._scale = scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object) -> Tensor:
        """query [1 or s, b, heads, dim], key and value [s, b, groups, dim] -> [1 or s, b, heads * dim]."""
        if query.size(0) == key.size(0):
            context: Tensor = self._inner(query, key, value, *args, **kwargs)
            return context
        gqa = query.size(2) != key.size(2)
        query, key, value = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))  # [b, heads, s, dim]
        attended = F.scaled_dot_product_attention(query, key, value, scale=self._scale, enable_gqa=gqa)
        return attended.permute(2, 0, 1, 3).flatten(2)


@contextlib.contextmanager
def inference_mode(chunks: Sequence[DistributedDataParallel], config: TransformerConfig) -> Iterator[None]:
    """Switch the chunks to evaluation, without sequence parallelism and with cached attention; undo it afterwards."""
    changed: list[tuple[object, str, object]] = []

    def change(owner: object, name: str, value: object) -> None:
        changed.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)

    try:
        for chunk in chunks:
            chunk.eval()
            for part in chunk.modules():
                for name in _SEQUENCE_PARALLEL:
                    if getattr(part, name, None) is True:  # one token cannot be split
                        change(part, name, False)
            for layer in chunk.module.decoder.layers:
                attention = layer.self_attention
                cached = CachedAttention(attention.core_attention, config.softmax_scale)
                change(attention, "core_attention", cached.eval())
        change(config, "sequence_parallel", False)
        yield
    finally:
        for owner, name, value in reversed(changed):
            setattr(owner, name, value)
        for chunk in chunks:
            chunk.train()


PATCH = Patch(
    name="inference",
    why="our core attention takes a query to be as long as its keys, and sequence parallelism splits a single token",
    targets=(
        "megatron.core.transformer.attention:SelfAttention",
        "megatron.core.inference.contexts:StaticInferenceContext",
    ),
    test="sft/megatron/patches/test_inference.py::test_one_query_sees_all_cached_keys",
)
