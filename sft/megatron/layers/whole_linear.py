"""A linear that every tensor parallel rank has whole: its outputs are too few to be worth an exchange of its inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sft.megatron.core import TransformerConfig, make_sharded_tensors_for_checkpoint


class WholeLinear(nn.Module):
    """With sequence parallel each rank multiplies its part of the sequence, and without it each does the same.

    Gradients are partial sums in the first case, which the mark makes Megatron-core add up, and whole in the second.
    """

    weight: Tensor
    bias: Tensor | None
    skip_bias_add = False

    def __init__(
        self, inputs: int, outputs: int, *, config: TransformerConfig, bias: bool, tp_group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.sequence_parallel: bool = config.sequence_parallel
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=config.params_dtype))
        self.register_parameter("bias", nn.Parameter(torch.zeros(outputs, dtype=config.params_dtype)) if bias else None)
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, input_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the output, and no bias that would have to be added."""
        return F.linear(input_, self.weight, self.bias), None

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: object = (), metadata: Mapping[str, object] | None = None
    ) -> dict[str, object]:
        """Return the weights for a sharded checkpoint, of which every rank has a copy."""
        assert metadata is not None  # it names the group that holds copies
        made: dict[str, object] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return made
