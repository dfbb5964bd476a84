"""From a fused QKV projection to heads, queries and keys turned by their positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def split_and_rotate(
    mixed: Tensor, groups: int, queries: int, angles: Tensor, positions: Tensor | None, magnitude: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value), each [s, b, heads, dim], from `mixed` [s, b, groups * (queries + 2) * dim].

    `angles` [positions, turned dimensions / 2], fp32; `positions` [s * b], or None where each of the b rows is one
    sequence from position 0 on. Where angles cover half of `dim` all of it is turned, else its first part. What is
    turned is multiplied by `magnitude` too (YaRN).
    """
    s, b = mixed.shape[:2]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    if mixed.is_cuda:
        rows = mixed.reshape(s * b, -1)
        heads = _SplitAndRotate.apply(rows, groups, queries, cos, sin, positions, b)
        query, key, value = (tensor.unflatten(0, (s, b)) for tensor in heads)
        return query, key, value
    if positions is None:
        cos, sin = (table[:s, None, None] for table in (cos, sin))
    else:
        cos, sin = (table[positions].view(s, b, 1, -1) for table in (cos, sin))
    heads = mixed.view(s, b, groups, queries + 2, -1)
    query, key, value = heads.split([queries, 1, 1], dim=3)
    return rotate(query.flatten(2, 3), cos, sin), rotate(key.flatten(2, 3), cos, sin), value.flatten(2, 3)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first 2 * half dimensions of `x` turned; cos and sin broadcast against them and end in `half`."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mixed: Tensor,
        groups: int,
        queries: int,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from sft.kernels.triton import rope as triton_rope

        ctx.save_for_backward(cos, sin, positions)
        ctx.rows = rows
        return triton_rope.forward(mixed.contiguous(), groups, queries, cos, sin, positions, rows)

    @staticmethod
    def backward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        from sft.kernels.triton import rope as triton_rope

        cos, sin, positions = ctx.saved_tensors
        grads = (query.contiguous(), key.contiguous(), value.contiguous())
        return triton_rope.backward(grads, cos, sin, positions, ctx.rows), None, None, None, None, None, None
