"""A mixture of experts in place of the MLP: a router that chooses, experts that compute, and the weighted sum.

Tensor parallel ranks hold a part of each expert's width, as they do of a dense MLP; every data parallel rank holds all
experts. The router works in fp32, once a token, on the tokens that the rank has: with sequence parallelism those of its
part, which are then gathered together with what was chosen for them.

Not Megatron-core's own MoE layer: its grouped experts need a package that has to be compiled, its loop over experts is
slow, its combination adds up with atomics (two runs differ on a GPU), and its gradient norm leaves experts out where
tensor and expert parallelism meet.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sft.kernels.grouped_experts import assign, expert_products, from_experts, to_experts
from sft.megatron.core import (
    MegatronModule,
    ShardedTensor,
    ShardedTensorFactory,
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)
from sft.megatron.layers.router import Router
from sft.models.architecture import Experts


class ExpertLinear(nn.Module):
    """The matrices of all experts, one below the other, split over tensor parallel ranks like a dense linear's."""

    def __init__(self, config: TransformerConfig, count: int, rows: int, columns: int, *, split: int) -> None:
        super().__init__()
        self._count = count
        self.weight = nn.Parameter(torch.empty(count * rows, columns, dtype=config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, split, 1)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the product of each expert's rows, which end where `ends` says, with its matrix."""
        return expert_products(rows, self.weight.view(self._count, -1, self.weight.size(1)), ends)


class ExpertMLP(MegatronModule):  # type: ignore[misc]
    """The feed-forward part of a decoder layer whose tokens go to a few of many SwiGLU MLPs."""

    def __init__(self, config: TransformerConfig, *, experts: Experts, **_: object) -> None:
        super().__init__(config=config)
        self._count = experts.count
        self.tp_group = parallel_state.get_tensor_model_parallel_group()
        width = experts.width // self.tp_group.size()
        self.router = Router(config, experts)
        self.linear_fc1 = ExpertLinear(config, experts.count, 2 * width, config.hidden_size, split=0)
        self.linear_fc2 = ExpertLinear(config, experts.count, config.hidden_size, width, split=1)
        self.sequence_parallel: bool = config.sequence_parallel

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        """Return the output, [s, b, h] as the input is, and no bias."""
        weights, chosen = self.router(hidden_states)
        tokens, weights, chosen = self._shared(hidden_states), self._shared(weights), self._gathered(chosen)
        assignment = assign(chosen.flatten(0, 1), self._count)
        rows = to_experts(tokens.flatten(0, 1), assignment)
        gate, up = self.linear_fc1(rows, assignment.ends).chunk(2, dim=-1)
        rows = self.linear_fc2(F.silu(gate) * up, assignment.ends)
        output = from_experts(rows, weights.flatten(0, 1), assignment).to(tokens.dtype).view_as(tokens)
        return self._reduced(output), None

    def _shared(self, own: Tensor) -> Tensor:
        """Return the values of all tokens on every rank of the group, whose gradients are summed over its ranks."""
        if self.sequence_parallel:
            gathered: Tensor = tensor_parallel.gather_from_sequence_parallel_region(own, group=self.tp_group)
            return gathered
        copied: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(own, group=self.tp_group)
        return copied

    def _gathered(self, chosen: Tensor) -> Tensor:
        return self._shared(chosen) if self.sequence_parallel else chosen

    def _reduced(self, partial: Tensor) -> Tensor:
        """Return the sum over the group, whose ranks have each computed a part of every expert's width."""
        if self.sequence_parallel:
            part: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(partial, group=self.tp_group)
            return part
        whole: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[tuple[int, int, int], ...] = (), metadata: Any = None
    ) -> dict[str, Any]:
        """Return the weights as a sharded checkpoint has them: fc1 as [experts, 2, width, hidden]."""
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            {"linear_fc1.weight": 0, "linear_fc2.weight": 1},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
        name = f"{prefix}linear_fc1.weight"
        state[name] = self._gate_and_up(state[name], sharded_offsets)
        return state

    def _gate_and_up(self, plain: ShardedTensor, offsets: tuple[tuple[int, int, int], ...]) -> ShardedTensorFactory:
        """Return fc1 as four axes: a rank's rows of each expert's gate and up are not one range of the whole matrix."""
        prepended, group, count = len(offsets), self.tp_group, self._count

        def build(key: str, weight: Tensor, replica_id: Any, *_: object) -> ShardedTensor:
            return ShardedTensor.from_rank_offsets(
                key,
                weight.view(count, 2, -1, weight.size(-1)),
                *offsets,
                (prepended + 2, group.rank(), group.size()),
                replica_id=replica_id,
                prepend_axis_num=prepended,
            )

        def merge(loaded: Tensor) -> Tensor:
            return loaded.reshape(-1, loaded.size(-1))

        return ShardedTensorFactory(plain.key, plain.data, build, merge, plain.replica_id)
