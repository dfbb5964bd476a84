"""Norms in plain torch, with the constructor and the sequence-parallel marks that Megatron-core expects.

Megatron-core's own torch norm refuses sequence parallel. Under it each rank norms its part of the sequence, so the
gradient of a weight is a partial sum; the mark makes `finalize_model_grads` add the parts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sft.megatron.core import TransformerConfig
from sft.models.architecture import Norm


class RMSNorm(torch.nn.RMSNorm):
    """Llama's: rounds to the type of the input before it multiplies by the weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class LateRoundedRMSNorm(RMSNorm):
    """Olmo's and gpt-oss': multiplies by the weight in fp32, and rounds to the type of the input at the end."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension, in the type of `x`."""
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(torch.nn.LayerNorm):
    """GPT-2's: mean and variance, with a weight and a bias."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in (self.weight, self.bias):
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ZeroCenteredRMSNorm(RMSNorm):
    """Gemma's: multiplies by 1 + weight, in fp32 up to the end."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **others: object) -> None:
        super().__init__(config, hidden_size, eps, **others)
        self.weight.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm over the last dimension, in the type of `x`."""
        return F.rms_norm(x.float(), self.normalized_shape, 1.0 + self.weight.float(), self.eps).to(x.dtype)


PLAIN_NORMS: dict[Norm, type[torch.nn.Module]] = {
    "rms": RMSNorm,
    "late_rounded_rms": LateRoundedRMSNorm,
    "zero_centered_rms": ZeroCenteredRMSNorm,
    "layer": LayerNorm,
}
