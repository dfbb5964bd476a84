"""Norms of query and key heads that come after RoPE (HunYuan), where those of other families come before it.

Megatron-core calls the norms of heads as it splits them, when they are not rotated yet. So the call passes heads on,
and attention asks for the norm itself when it has rotated them. Parameters keep the names that Megatron-core adds up
gradients by.
"""

from __future__ import annotations

from torch import Tensor, nn

from sft.megatron.layers.norms import RMSNorm


class AfterRotation(nn.Module):
    """Goes before the class of a norm among the bases of one that waits for rotated heads."""

    def forward(self, heads: Tensor) -> Tensor:
        """Return `heads` as they are."""
        return heads

    def of_rotated(self, heads: Tensor) -> Tensor:
        """Return the norm of heads that have been rotated."""
        normed: Tensor = super().forward(heads)
        return normed


class RotatedRMSNorm(AfterRotation, RMSNorm):
    """Llama's norm, of rotated heads."""


def norm_rotated(norm: nn.Module | None, heads: Tensor) -> Tensor:
    """Return rotated heads, normed where `norm` waits for them."""
    return norm.of_rotated(heads) if isinstance(norm, AfterRotation) else heads
