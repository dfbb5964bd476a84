"""SwiGLU and GeGLU on a CPU, as transformers has them."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN

from sft.kernels.gated import Gate, gated


@pytest.mark.parametrize(("gate", "theirs"), [("silu", "silu"), ("gelu_tanh", "gelu_pytorch_tanh")])
def test_gate_comes_first_and_is_activated(gate: Gate, theirs: str) -> None:
    x = torch.randn(5, 2, 12, generator=torch.Generator().manual_seed(0))
    values, up = x.chunk(2, dim=-1)
    torch.testing.assert_close(gated(x, gate), ACT2FN[theirs](values) * up)
