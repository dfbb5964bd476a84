"""Layers whose output is multiplied by a number that the files hold (Gemma 4). It is a buffer: never trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sft.megatron.layers.fused import FusedTransformerLayer
from sft.megatron.layers.post_norms import PostNormTransformerLayer


class _Scaled:
    """What both classes below add to their layer."""

    output_scale: Tensor

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        # In fp32, as other buffers: exports have the number as the files have it.
        self.register_buffer("output_scale", torch.ones(1))  # type: ignore[attr-defined]

    def forward(self, *args: object, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the output, [s, b, h], and what the layer returns beside it."""
        hidden, context = super().forward(*args, **kwargs)  # type: ignore[misc]
        return hidden * self.output_scale.to(hidden.dtype), context


class ScaledPostNormLayer(_Scaled, PostNormTransformerLayer):
    """The plain layer with norms behind attention and MLP."""


class ScaledFusedLayer(_Scaled, FusedTransformerLayer):
    """The fused one."""
