"""Split a fused QKV projection into heads and rotate queries and keys by their positions (RoPE, arXiv:2104.09864).

The projection holds, for each KV group, its query heads, then its key head, then its value head (Megatron-core's
order). A rotation turns dimension i together with dimension i + half, as Hugging Face's models do ("rotate half"), not
neighbouring dimensions as in the paper.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from sft.kernels.autograd import Context


def split_and_rotate(
    mixed: Tensor, groups: int, queries: int, angles: Tensor, positions: Tensor | None, magnitude: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Return query, key and value, each [s, b, heads, dim], from `mixed` [s, b, groups * (queries + 2) * dim].

    `angles` [positions, half] in fp32 rotate the first 2 * half dimensions of each head; the rest stays as it is.
    `positions` [s * b] are the rows of `angles` to take; None where each of the b rows is one sequence from position 0
    on. `magnitude` also multiplies what is rotated (YaRN's attention factor, arXiv:2309.00071).
    """
    s, b = mixed.shape[:2]
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    if mixed.is_cuda:
        rows = mixed.reshape(s * b, -1)
        heads = _SplitAndRotate.apply(rows, groups, queries, cos, sin, positions, b)
        query, key, value = (tensor.unflatten(0, (s, b)) for tensor in heads)
        return query, key, value
    cos, sin = (of_tokens(table, positions, s, b) for table in (cos, sin))
    heads = mixed.view(s, b, groups, queries + 2, -1)
    query, key, value = heads.split([queries, 1, 1], dim=3)
    return rotate(query.flatten(2, 3), cos, sin), rotate(key.flatten(2, 3), cos, sin), value.flatten(2, 3)


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    """Return `x` [s, b, heads, dim] rotated, by fp32 tables cos and sin [positions, half].

    `positions` as for `split_and_rotate`.
    """
    s, b = x.shape[:2]
    if x.is_cuda:
        rows: Tensor = _RotateHeads.apply(x.flatten(0, 1), cos, sin, positions, b)
        return rows.view_as(x)
    return rotate(x, *(of_tokens(table, positions, s, b) for table in (cos, sin)))


def of_tokens(table: Tensor, positions: Tensor | None, s: int, b: int) -> Tensor:
    """Return the rows of the tokens, [s, b or 1, 1, half]."""
    return table[:s, None, None] if positions is None else table[positions].view(s, b, 1, -1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` with its first 2 * half dimensions rotated, by cos and sin that broadcast to [..., half]."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(x.dtype)


class _RotationContext(Context, Protocol):
    rows: int


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _RotationContext,
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
    def backward(ctx: _RotationContext, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor | None, ...]:
        from sft.kernels.triton import rope as triton_rope

        cos, sin, positions = ctx.saved_tensors
        grads = (query.contiguous(), key.contiguous(), value.contiguous())
        return triton_rope.backward(grads, cos, sin, positions, ctx.rows), None, None, None, None, None, None


class _RotateHeads(torch.autograd.Function):
    """In torch's own operations the products, sums and their gradients would each pass through memory in fp32."""

    @staticmethod
    def forward(
        ctx: _RotationContext, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, rows: int
    ) -> Tensor:
        from sft.kernels.triton import rope as triton_rope

        ctx.save_for_backward(cos, sin, positions)
        ctx.rows = rows
        return triton_rope.rotate_heads(x.contiguous(), cos, sin, positions, rows)

    @staticmethod
    def backward(ctx: _RotationContext, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from sft.kernels.triton import rope as triton_rope

        cos, sin, positions = ctx.saved_tensors
        # A rotation is orthogonal: its gradient is turned back.
        return triton_rope.rotate_heads(grads[0].contiguous(), cos, -sin, positions, ctx.rows), None, None, None, None
