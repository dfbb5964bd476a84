"""GeGLU on a CPU, in the form that transformers calls gelu_pytorch_tanh."""

from __future__ import annotations

import torch
from transformers.activations import ACT2FN

from sft.kernels.geglu import geglu


def test_gate_comes_first_and_is_activated() -> None:
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(geglu(x), ACT2FN["gelu_pytorch_tanh"](gate) * up)
