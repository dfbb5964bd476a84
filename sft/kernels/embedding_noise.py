"""Uniform noise that is a function of who, where and which channel, and of nothing else.

A random generator's numbers depend on the order in which they are drawn, so on the layout. Here each number is a hash
of its token's seed, the token's position and the channel: every rank computes those of the tokens it holds. The hash is
two rounds of "lowbias32" (Chris Wellons, "Prospecting for Hash Functions", 2018), in 32-bit integers, which wrap.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = -1640531527  # 0x9E3779B9, the golden ratio of 2^32, as int32
_FIRST, _SECOND = 0x7FEB352D, -2073254261  # the latter is 0x846CA68B


def uniform_noise(seeds: Tensor, positions: Tensor, channels: int) -> Tensor:
    """Return numbers in (-1, 1), fp32 [..., channels], of int64 seeds [...] and positions [...]."""
    low, high = (part.to(torch.int32) for part in (seeds, seeds >> 32))
    token = _mixed(_mixed(positions.to(torch.int32) ^ low) ^ high)
    second = _mixed(token + _STEP)
    channel = torch.arange(channels, dtype=torch.int32, device=seeds.device) * _STEP
    bits = _mixed(_mixed(token[..., None] ^ channel) + second[..., None])
    return ((bits >> 8).float() + 0.5) * 2.0**-23  # 24 bits, which fp32 holds exactly


def _mixed(x: Tensor) -> Tensor:
    """Return the hash of each int32."""
    x = x ^ _right(x, 16)
    x = x * _FIRST
    x = x ^ _right(x, 15)
    x = x * _SECOND
    return x ^ _right(x, 16)


def _right(x: Tensor, bits: int) -> Tensor:
    """Return the unsigned right shift, where `>>` would repeat the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)
