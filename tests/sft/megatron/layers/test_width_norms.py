"""The norm over all heads rounds where each family's own does, bit by bit in bf16."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest
import torch

from tests.ranks import run_ranks

HEADS, DIM = 3, 16


def same_bits() -> dict[str, bool]:
    """Runs on a rank: whether each norm is its family's, and differs from the other."""
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    from sft.megatron.core import TransformerConfig, parallel_state
    from sft.megatron.layers.width_norms import WidthRMSNorm

    parallel_state.initialize_model_parallel()
    config = cast(TransformerConfig, SimpleNamespace(params_dtype=torch.bfloat16))
    torch.manual_seed(0)
    x, weight = torch.randn(40, 2, HEADS, DIM).bfloat16(), torch.randn(HEADS * DIM).bfloat16()
    outputs = {}
    for late, reference in ((False, OlmoeRMSNorm), (True, Olmo2RMSNorm)):
        ours, theirs = WidthRMSNorm(config, DIM, 1e-5, heads=HEADS, late=late), reference(HEADS * DIM, 1e-5).bfloat16()
        for norm in (ours, theirs):
            norm.weight.data.copy_(weight)
        outputs[late] = ours(x), theirs(x.flatten(-2)).view_as(x)
    same = {str(late): torch.equal(own, other) for late, (own, other) in outputs.items()}
    return same | {"apart": not torch.equal(outputs[False][0], outputs[True][0])}


@pytest.mark.parity
def test_rounding_is_that_of_the_family() -> None:
    assert run_ranks(1, same_bits, init=True) == [{"False": True, "True": True, "apart": True}]
