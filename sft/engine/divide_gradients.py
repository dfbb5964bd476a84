"""Where gradients are divided by the weight of the global batch: once, and never by a count of ranks.

With plain kernels that happens after gradients were reduced over ranks. Megatron-core's schedules call
`reduce_and_divide_gradients` in place of their own `finalize_model_grads`, which divides by a count of tokens: an
integer that has to be reduced over ranks first. Fractional weights do not fit into it, and the sum is known beforehand.

Fused kernels compute gradients of the loss in the forward pass, from weights that are divided already
(`divide_weights`): that saves a pass over all gradients.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sft.megatron.core import DistributedDataParallel, finalize_model_grads


def divide_weights(weights: Tensor, divisor: float) -> Tensor:
    """Return the loss weights from which come gradients that need no division. With 0 they stay as they are: zeros."""
    return weights / (divisor or 1.0)


def reduce_and_divide_gradients(
    model_chunks: list[DistributedDataParallel], num_tokens: Tensor | None, *, divisor: float, **kwargs: Any
) -> None:
    """Reduce the gradients of all chunks as Megatron-core does, then divide them by `divisor`. With 0 they are 0."""
    finalize_model_grads(model_chunks, None, **kwargs)
    if divisor != 1.0:
        for model_chunk in model_chunks:
            model_chunk.scale_gradients(1.0 / divisor if divisor > 0 else 0.0)
