"""Causal attention over packed sequences with grouped KV heads, by the faster of two kernels.

FlashAttention-4 (package flash-attn-4, for Hopper and Blackwell, compiled at its first call) where it is installed,
else the FlashAttention-2 that torch contains. Measured on an H100 with 8 packed rows of chats of mixed length, forward
and backward: 2.1 ms against 3.8 ms with 32 heads of 64, 2.9 ms against 4.8 ms with 24 heads of 128. On rows of equal
length it is at least as fast as cuDNN's kernel.

Rejected, as measured on an H200 with torch 2.11:
* cuDNN's kernel for packed sequences: 60 ms for what takes 0.5 ms here, and gradients of NaN. On rows of equal length
  it is 1.5 times as fast as FlashAttention-2, and `scaled_dot_product_attention` already uses it there.
* Long and short sequences in two calls, to avoid thread blocks without work: 3 to 5 % slower.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import warnings
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from sft.kernels.autograd import Context
from sft.kernels.sinks import sinks_gradient, with_sinks

Kernel = Literal["flash2", "flash4"]


def fastest_kernel(head_dim: int) -> Kernel:
    """Return the fastest correct kernel on this machine for heads of `head_dim`.

    The rule is fixed, not timed when a run starts, so that a resumed run computes with the kernel it began with.
    """
    # FlashAttention-4 sums dQ in the order in which blocks happen to finish.
    if torch.are_deterministic_algorithms_enabled() or not torch.cuda.is_available():
        return "flash2"
    capable = torch.cuda.get_device_capability()[0] in (9, 10) and flash4_takes(head_dim)
    return "flash4" if capable and has_flash4() else "flash2"


def flash4_takes(head_dim: int) -> bool:
    """Return whether FlashAttention-4 is known to be correct for heads of this size: 32, 64, 96 or 128."""
    # Version 4.0.0b36 silently returns a wrong dQ on Hopper where head_dim rounded up to a multiple of 16 is not a
    # multiple of 32 (72, 80, 104, 112; seen at 80, issue 2896 of its repository).
    return head_dim % 32 == 0 and head_dim <= 128


@functools.cache
def flash4_has_gradients_of(option: Literal["learnable_sink", "softcap"]) -> bool:
    """Return whether the backward pass of the installed flash-attn-4 knows this option. That of early versions ignores
    what their forward pass takes."""
    if not has_flash4():
        return False
    from flash_attn.cute import interface  # an optional package that takes seconds to import

    return option in inspect.signature(interface._flash_attn_bwd).parameters


def has_flash4() -> bool:
    """Return whether flash-attn-4 is installed and can be imported."""
    return _is_installed() and broken_flash4() is None


@functools.cache
def broken_flash4() -> str | None:
    """Return why flash-attn-4, which is installed, cannot be imported, or None. The first call takes seconds."""
    if not _is_installed():
        return None
    try:
        importlib.import_module("flash_attn.cute")
    except (ImportError, AttributeError, OSError, RuntimeError) as error:  # its compiler is a package of its own
        return f"{type(error).__name__}: {error}"
    return None


def _is_installed() -> bool:
    try:
        # FlashAttention-2 installs a package `flash_attn` as well, but without `cute`.
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ImportError:  # no such package, or a version of it that cannot be imported
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
    window: int | None = None,
    key_offsets: Tensor | None = None,
    longest_key: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Return the causal attention of each packed sequence, [t, heads, dim], in the inputs' type (bf16 or fp16).

    query [t, heads, dim]; key and value [u, groups, dim]. Sequence i is the rows offsets[i] to offsets[i + 1] (int32,
    [sequences + 1]), `longest` the length of the longest; `scale` None means 1 / sqrt(dim). With a `window` a query
    sees that many positions at most, its own included. With `key_offsets` and `longest_key` a sequence may have more
    keys than queries (context parallelism): its queries are then the last of its positions. `sinks` [heads] are one
    more entry of each head's softmax (sft.kernels.sinks). With a `softcap` c, which flash4 alone has, scores s are
    c * tanh(s / c).
    """
    keys = (offsets, longest) if key_offsets is None or longest_key is None else (key_offsets, longest_key)
    if kernel == "flash4":
        return _flash4()(query, key, value, offsets, longest, *keys, scale, window, sinks, softcap)
    assert softcap is None, "FlashAttention-2, as torch has it, caps no scores"
    context: Tensor = _Flash.apply(query, key, value, offsets, longest, *keys, scale, window, sinks)
    return context


@functools.cache
def _flash4() -> Callable[..., Tensor]:
    # Its compiler warns about its own argument types at the first call in forward, and again in backward, when a
    # `catch_warnings` around this call would be over.
    warnings.filterwarnings("ignore", ".*cannot be converted to a JitArgument", UserWarning)
    from flash_attn.cute import flash_attn_varlen_func  # an optional package that takes seconds to import

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        key_offsets: Tensor,
        longest_key: int,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None,
        softcap: float | None,
    ) -> Tensor:
        own: dict[str, object] = {} if sinks is None else {"learnable_sink": sinks}
        own |= {} if softcap is None else {"softcap": softcap}
        context: Tensor = flash_attn_varlen_func(
            query, key, value,
            cu_seqlens_q=offsets, cu_seqlens_k=key_offsets, max_seqlen_q=longest, max_seqlen_k=longest_key,
            softmax_scale=scale, causal=True, window_size=(None if window is None else window - 1, None), **own,
        )[0]  # fmt: skip
        return context

    return attend


class _FlashContext(Context, Protocol):
    longest: int
    longest_key: int
    causal: bool
    """Whether the kernel masks what comes after a query; with a window that is part of the options."""
    options: dict[str, float | int | None]
    """The scale, and what a query sees to its left and right beside its own position, if not everything."""


class _Flash(torch.autograd.Function):
    """FlashAttention-2 by torch's operators: `varlen_attn` takes fewer KV heads than query heads only from 2.13 on."""

    @staticmethod
    def forward(
        ctx: _FlashContext,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        longest: int,
        key_offsets: Tensor,
        longest_key: int,
        scale: float | None,
        window: int | None,
        sinks: Tensor | None,
    ) -> Tensor:
        context: Tensor
        ctx.options = {"scale": scale}
        if window is not None:
            ctx.options |= {"window_size_left": window - 1, "window_size_right": 0}
        ctx.causal = window is None
        # The literals: no dropout, no debug mask. `state` and `unused` belong to dropout's random numbers.
        context, log_sum, state, unused, _ = torch.ops.aten._flash_attention_forward(
            query, key, value, offsets, key_offsets, longest, longest_key, 0.0, ctx.causal, False, **ctx.options
        )
        if sinks is not None:
            context, log_sum = with_sinks(context, log_sum, sinks)
        ctx.save_for_backward(query, key, value, context, log_sum, state, unused, offsets, key_offsets, sinks)
        ctx.longest, ctx.longest_key = longest, longest_key
        return context

    @staticmethod
    def backward(ctx: _FlashContext, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, context, log_sum, state, unused, offsets, key_offsets, sinks = ctx.saved_tensors
        own = None if sinks is None else sinks_gradient(grad, context, log_sum, sinks)
        grads = torch.ops.aten._flash_attention_backward(
            grad.contiguous(), query, key, value, context, log_sum, offsets, key_offsets, ctx.longest, ctx.longest_key,
            0.0, ctx.causal, state, unused, **ctx.options,
        )  # fmt: skip
        return *grads[:3], None, None, None, None, None, None, own
