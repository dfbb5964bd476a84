"""Norms of single model families; Llama's is in `sft.megatron.layers.attention`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.megatron.core import TransformerConfig
from sft.megatron.layers.attention import RMSNorm


class LayerNorm(torch.nn.LayerNorm):
    """GPT-2's: torch's LayerNorm, with the constructor and the sequence-parallel marks that Megatron-core expects."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ZeroCenteredRMSNorm(RMSNorm):
    """Gemma's: multiplies by 1 + weight, in fp32 up to the end, where Llama's rounds before it multiplies."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **others: Any) -> None:
        super().__init__(config, hidden_size, eps, **others)
        self.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """The norm over the last dimension, in the type of `x`."""
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)
