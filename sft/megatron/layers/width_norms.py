"""The norm of all query heads together, or of all key heads, as Olmo 2 and OLMoE have it: a mean over the whole width.

Tensor parallel ranks have some of the heads each. They add up their squares, and the weight is split like the heads,
so that each rank has the whole gradient of its part.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sft.megatron.core import (
    TransformerConfig,
    make_sharded_tensors_for_checkpoint,
    parallel_state,
    tensor_parallel,
)


class WidthRMSNorm(nn.Module):
    """RMSNorm over `heads` heads of all ranks. Rounds before the product with the weight, or with `late` after it."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float, *, heads: int, late: bool) -> None:
        super().__init__()
        self._late = late
        self._group = parallel_state.get_tensor_model_parallel_group()
        self._width = heads * hidden_size
        self._eps = eps
        own = self._width // self._group.size()
        self.weight = nn.Parameter(torch.ones(own, dtype=config.params_dtype))
        tensor_parallel.set_tensor_model_parallel_attributes(self.weight, True, 0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of this rank's heads, [s, b, heads, dim]."""
        wide = x.flatten(-2).float()
        squares = wide.square().sum(-1, keepdim=True)
        if self._group.size() > 1:
            # Every rank's output depends on the sum: it is added up forward, and so is its gradient backward.
            squares = tensor_parallel.reduce_from_tensor_model_parallel_region(squares, group=self._group)
            squares = tensor_parallel.copy_to_tensor_model_parallel_region(squares, group=self._group)
        normed = wide * torch.rsqrt(squares / self._width + self._eps)
        weighted = normed * self.weight.float() if self._late else normed.to(x.dtype) * self.weight
        return weighted.to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: object = (), metadata: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """Return the weight for a sharded checkpoint. Megatron-core would take it for whole on each rank."""
        assert metadata is not None  # it names the group that holds copies
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"weight": 0},
            sharded_offsets,
            tp_group=self._group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return made
