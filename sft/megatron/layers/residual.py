"""The residual addition of layers that are not fused."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from sft.megatron.core import get_bias_dropout_add

Branch = tuple[Tensor, Tensor | None]
"""Output of attention or MLP, and the bias that has yet to be added to it."""
Add = Callable[[Branch, Tensor, float], Tensor]
"""(branch, residual, dropout) -> their sum."""


def residual_addition(multiplier: float) -> Callable[[bool, bool], Add]:
    """Return what Megatron-core's layer asks, given (training, fused), for residual + dropout(multiplier * branch)."""
    if multiplier == 1.0:
        plain: Callable[[bool, bool], Add] = get_bias_dropout_add
        return plain

    def scaled(training: bool, fused: bool) -> Add:
        add: Add = get_bias_dropout_add(training, fused)

        def scaled_add(branch: Branch, residual: Tensor, dropout: float) -> Tensor:
            output, bias = branch
            whole = output if bias is None else output + bias
            return add((whole * multiplier, None), residual, dropout)

        return scaled_add

    return scaled
