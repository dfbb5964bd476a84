"""NCCL communicators that are built when ranks first send in a group, not when the group is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sft.megatron.patches.patch import Patch


@contextmanager
def communicators_on_demand() -> Iterator[None]:
    """Let NCCL build the communicator of a group made in this block when its ranks first send.

    Lightning binds the world to a device, and torch then splits a communicator off at once for each new group.
    """
    world = dist.distributed_c10d._get_default_group()
    bound = world.bound_device_id
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


PATCH = Patch(
    name="communicators",
    why="Megatron-core makes twenty groups, most of them of one rank or never used, and each would hold 0.4 GiB of an "
    "H100",
    targets=("megatron.core.parallel_state:initialize_model_parallel",),
    test="sft/megatron/patches/test_communicators.py::test_groups_are_made_in_an_unbound_world",
)
