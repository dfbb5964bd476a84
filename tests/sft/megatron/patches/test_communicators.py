"""Groups are made without their communicators."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from launcher.contract.topology import Topology
from sft.megatron.core import parallel_state
from sft.megatron.parallel.groups import init_model_parallel
from tests.ranks import run_ranks

pytestmark = pytest.mark.parity

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


def test_groups_are_made_in_an_unbound_world() -> None:
    """Torch splits a communicator off for each new group of a world that is bound to a device."""
    assert run_ranks(1, bound_devices, init=True) == [(None, "meta:0")]


def bound_devices() -> tuple[object, str]:
    """Runs on a rank: the world's device while Megatron-core makes its groups, and afterwards."""
    world = dist.distributed_c10d._get_default_group()
    world.bound_device_id = torch.device("meta", 0)
    seen: list[object] = []
    stock = parallel_state.initialize_model_parallel

    def looking(*args: object, **kwargs: object) -> None:
        seen.append(world.bound_device_id)
        stock(*args, **kwargs)

    parallel_state.initialize_model_parallel = looking
    init_model_parallel(ONE_RANK, seed=1)
    return seen[0], str(world.bound_device_id)
