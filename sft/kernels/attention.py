"""Causal attention over packed sequences, without repeating KV heads, by the faster of two kernels.

FlashAttention-4 (the package flash-attn-4, written for Hopper and Blackwell in Python and compiled at its first call)
where it is installed, else the FlashAttention-2 that torch carries. Measured on an H100 for 8 packed rows of ragged
chat, forward and backward: 2.1 ms against 3.8 with 32 heads of 64, 2.9 against 4.8 with 24 heads of 128; on rows of
equal length as fast as cuDNN's kernel or faster. The rule is fixed, not timed at the start of each run, so that a run
that resumes computes with the kernel it began with.

Only heads of 32, 64, 96 or 128 go to FlashAttention-4: 4.0.0b36 returns wrong dQ on Hopper, without a word, where a
head's size rounded up to 16 is not one rounded up to 32 (72, 80, 104, 112; seen at 80, its repository's #2896).

torch's is called by its operator, because torch's own function for it (`varlen_attn`) takes no fewer KV heads than
query heads before torch 2.13.

Rejected, after measuring on an H200 with torch 2.11: cuDNN's kernel for offsets (60 ms for what takes 0.5 ms here, and
gradients of NaN; on rows of equal lengths it is 1.5 times as fast as FlashAttention-2, and comes in by
`scaled_dot_product_attention`), and long and short sequences in two calls, which was to spare blocks that find nothing
to do (3 to 5 % slower).
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

Kernel = Literal["flash2", "flash4"]


def fastest_kernel(head_dim: int) -> Kernel:
    """The kernel for this machine, and whether the run must be repeatable: FlashAttention-4 adds up dQ as it comes."""
    if torch.are_deterministic_algorithms_enabled() or not torch.cuda.is_available():
        return "flash2"
    capable = torch.cuda.get_device_capability()[0] in (9, 10) and flash4_takes(head_dim)
    return "flash4" if capable and has_flash4() else "flash2"


def flash4_takes(head_dim: int) -> bool:
    """Whether heads of this size are among those for which FlashAttention-4 is known to be right."""
    return head_dim % 32 == 0 and head_dim <= 128


def has_flash4() -> bool:
    """Whether flash-attn-4 is installed. FlashAttention-2 has the same package name without the part asked for."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no package of that name, or another version of it that does not load
        return False


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor,
    longest: int,
    scale: float | None,
    kernel: Kernel = "flash2",
    *,
    key_offsets: Tensor | None = None,
    longest_key: int | None = None,
) -> Tensor:
    """[t, heads, dim], [u, groups, dim] twice -> [t, heads, dim], in bf16 or fp16; offsets int32 [sequences + 1].

    Where keys have offsets of their own, the queries of a sequence are the last of its positions.
    """
    keys = (offsets, longest) if key_offsets is None or longest_key is None else (key_offsets, longest_key)
    if kernel == "flash4":
        return _flash4()(query, key, value, offsets, longest, *keys, scale)
    context: Tensor = _Flash.apply(query, key, value, offsets, longest, *keys, scale)
    return context


@functools.cache
def _flash4() -> Callable[..., Tensor]:
    # Its compiler warns of its own argument types at the first call forward and, on autograd's thread, backward.
    warnings.filterwarnings("ignore", ".*cannot be converted to a JitArgument", UserWarning)
    from flash_attn.cute import flash_attn_varlen_func

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        key_offsets: Tensor,
        longest_key: int,
        scale: float | None,
    ) -> Tensor:
        context: Tensor = flash_attn_varlen_func(
            query, key, value,
            cu_seqlens_q=offsets, cu_seqlens_k=key_offsets, max_seqlen_q=longest, max_seqlen_k=longest_key,
            softmax_scale=scale, causal=True,
        )[0]  # fmt: skip
        return context

    return attend


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        key_offsets: Tensor,
        longest_key: int,
        scale: float | None,
    ) -> Tensor:
        context: Tensor
        context, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, key_offsets, longest, longest_key, 0.0, True, False, scale=scale
        )
        ctx.save_for_backward(query, key, value, context, log_sum, state, unused, offsets, key_offsets)
        ctx.longest, ctx.longest_key, ctx.scale = longest, longest_key, scale
        return context

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, context, log_sum, state, unused, offsets, key_offsets = ctx.saved_tensors
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, context, log_sum, offsets, key_offsets, ctx.longest, ctx.longest_key,
            0.0, True, state, unused, scale=ctx.scale,
        )  # fmt: skip
        return *grads[:3], None, None, None, None, None
