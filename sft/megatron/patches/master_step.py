"""The update of a distributed optimizer with fused kernels: master weights and weights of this rank in one pass.

State and groups stay those of torch's AdamW, so that checkpoints and schedules see no difference. Its protocol for
skipping a step (`found_inf`) and scaling gradients (`grad_scale`), both on the device, is kept too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from sft.kernels import adamw
from sft.megatron.patches.adamw_state import prime_states
from sft.megatron.patches.patch import Patch

if TYPE_CHECKING:
    from sft.kernels.triton import adamw as triton_adamw


def use_one_pass(part: MegatronOptimizer) -> None:
    """Let `part` update all its shards in one pass, where it is a distributed optimizer of half precision weights."""
    if not isinstance(part, DistributedOptimizer) or part.is_stub_optimizer or any(part.shard_fp32_groups):
        return
    part.optimizer.step = MasterStep(part, _copies(part))
    part._copy_main_params_to_model_params = _nothing_left_to_copy


def _nothing_left_to_copy() -> None:
    pass


def _copies(part: DistributedOptimizer) -> dict[Tensor, Tensor]:
    """Return, by shard of a master weight, the same part of the weight as a view of the buffer that ranks gather."""
    copies = {}
    for masters, weights in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            places = part._get_model_param_range_map(weight)["gbuf_world_in_bucket"]
            buffer, _, bucket = part.model_param_gbuf_map[weight]
            data = part.buffers[buffer].buckets[bucket].param_data
            copies[master] = data.view(-1)[places.start : places.end]
    return copies


class MasterStep:
    """Takes the place of `step` of the AdamW inside a distributed optimizer."""

    def __init__(self, part: DistributedOptimizer, copies: dict[Tensor, Tensor]) -> None:
        self._part = part
        self._copies = copies
        self._tables: dict[int, triton_adamw.Table] = {}
        """By group."""

    def __call__(self) -> None:
        prime_states(self._part)
        optimizer = self._part.optimizer
        skip = optimizer.found_inf
        scale = getattr(optimizer, "grad_scale", None)
        scale = torch.ones_like(skip) if scale is None else scale
        for index, group in enumerate(optimizer.param_groups):
            masters = [master for master in group["params"] if master.grad is not None]
            if not masters:
                continue
            steps = [optimizer.state[master]["step"] for master in masters]
            torch._foreach_add_(steps, [1 - skip] * len(steps))  # of one tensor it would ask the device for its value
            corrections = adamw.bias_corrections(torch.stack(steps), group["betas"])
            settings = adamw.Settings(*(group[name] for name in adamw.Settings._fields))
            self._update(index, [self._row(master) for master in masters], corrections, scale, skip, settings)

    def _row(self, master: Tensor) -> adamw.Row:
        state = self._part.optimizer.state[master]
        assert master.grad is not None
        return adamw.Row(master.detach(), master.grad, state["exp_avg"], state["exp_avg_sq"], self._copies[master])

    def _update(
        self,
        group: int,
        rows: list[adamw.Row],
        corrections: Tensor,
        scale: Tensor,
        skip: Tensor,
        settings: adamw.Settings,
    ) -> None:
        if not rows[0].weight.is_cuda:
            adamw.update(rows, corrections, scale, skip, settings)
            return
        from sft.kernels.triton import adamw as triton_adamw  # Triton is there where fused kernels run on a GPU

        table = self._tables.get(group)
        # Gradients that are reduced in bf16 are at other addresses in each step.
        if table is None or table.addresses != triton_adamw.addresses_of(rows):
            self._tables[group] = table = triton_adamw.Table(rows)
        triton_adamw.update(table, corrections, scale, skip, settings)


PATCH = Patch(
    name="master_step",
    why="Megatron-core copies master weights into the weights in a pass of its own, and casts gradients in another",
    targets=(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._copy_main_params_to_model_params",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._get_model_param_range_map",
    ),
    test="sft/kernels/test_adamw.py::test_equals_torch_and_rounds_the_copies",
)
