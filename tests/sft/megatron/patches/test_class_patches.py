"""Patches of classes and modules whose wrong result shows without a training run."""

from __future__ import annotations

import pytest
import torch

import sft.megatron.core as core
from launcher.contract.topology import Topology
from sft.megatron.parallel.groups import init_model_parallel
from tests.ranks import run_ranks

ONE_RANK = Topology(
    world_size=1,
    ranks_per_node=1,
    tensor_parallel=1,
    pipeline_parallel=1,
    virtual_pipeline=1,
    context_parallel=1,
    expert_parallel=1,
    expert_tensor_parallel=1,
    data_parallel=1,
    sequence_parallel=False,
    micro_batch_size=1,
    global_batch_size=1,
)


def test_forked_generator_state_is_restored() -> None:
    """Unpatched, the tracker's fork would leave the default generator where the fork ended."""
    torch.manual_seed(1)
    tracker = core.tensor_parallel.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("a-stream", 5)
    before = torch.get_rng_state()
    with tracker.fork("a-stream"):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before) or torch.cuda.is_available()
    with tracker.fork("a-stream"):
        assert not torch.equal(torch.rand(3), first)
    tracker.reset()


def test_no_fp8_recipe_would_be_taken_for_one() -> None:
    checkpoint = core.tensor_parallel.random.CheckpointWithoutOutput
    assert not checkpoint().fp8
    unpatched = checkpoint()
    checkpoint.__init__.__wrapped__(unpatched)
    assert unpatched.fp8


@pytest.mark.parity
def test_linears_would_refuse_fused_gradients() -> None:
    assert run_ranks(1, error_of_a_linear, True, init=True) == [None]
    (error,) = run_ranks(1, error_of_a_linear, False, init=True)
    assert "gradient_accumulation_fusion" in str(error)


def error_of_a_linear(patched: bool) -> str | None:
    """Runs on a rank: what building a linear with gradients fused says, or None."""
    import megatron.core.tensor_parallel.layers as linears

    linears._grad_accum_fusion_available &= patched
    init_model_parallel(ONE_RANK, seed=1)
    config = core.TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, gradient_accumulation_fusion=True
    )
    try:
        linears.ColumnParallelLinear(8, 8, config=config, init_method=torch.nn.init.zeros_)
    except RuntimeError as error:
        return str(error)
    return None
