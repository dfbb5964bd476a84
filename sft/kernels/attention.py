"""Causal attention over packed sequences by the FlashAttention kernel that torch carries, without repeating KV heads.

It is called by its operator, because torch's own function for it (`varlen_attn`) takes no fewer KV heads than query
heads before torch 2.13.

Rejected, after measuring on an H200 with torch 2.11: cuDNN's kernel for offsets (60 ms for what takes 0.5 ms here, and
gradients of NaN; on rows of equal lengths it is 1.5 times as fast, and comes in by `scaled_dot_product_attention`),
and long and short sequences in two calls, which was to spare blocks that find nothing to do (3 to 5 % slower).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flash(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float | None) -> Tensor:
    """[t, heads, dim], [t, groups, dim] twice -> [t, heads, dim], in bf16 or fp16; offsets int32 [sequences + 1]."""
    context: Tensor = _Flash.apply(query, key, value, offsets, longest, scale)
    return context


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, longest: int, scale: float | None
    ) -> Tensor:
        context: Tensor
        context, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, offsets, longest, longest, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, context, log_sum, state, unused, offsets)
        ctx.longest, ctx.scale = longest, scale
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, context, log_sum, state, unused, offsets = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, context, log_sum, offsets, offsets, ctx.longest, ctx.longest,
            0.0, True, state, unused, scale=ctx.scale,
        )  # fmt: skip
        return *grads[:3], None, None, None
