"""Where gradients are divided: reduced over ranks as they are, then divided once by the weight of the global batch.

Megatron-core's schedules call this in place of its own `finalize_model_grads`, which divides by a count of tokens: an
integer that it has to reduce over ranks first. Fractional weights do not fit into it, and the sum is known beforehand.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sft.megatron.core import DistributedDataParallel, finalize_model_grads


def reduce_and_divide_gradients(
    model_chunks: list[DistributedDataParallel], num_tokens: Tensor | None, *, divisor: float, **kwargs: Any
) -> None:
    """Reduce the gradients of all chunks as Megatron-core does, then divide them by `divisor`. With 0 they are 0."""
    finalize_model_grads(model_chunks, None, **kwargs)
    if divisor != 1.0:
        for model_chunk in model_chunks:
            model_chunk.scale_gradients(1.0 / divisor if divisor > 0 else 0.0)
