"""Low-rank adapters of experts: one for each matrix of each expert, whichever rank holds it.

A rank has the adapters of its experts, and computes all of them by one grouped product for A and one for B. They are
reduced over ranks as the experts' own weights would be. Experts whose matrices are shared by ranks take none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.contract.spec import LoraSpec
from sft.hf.expert_adapter import ExpertTarget
from sft.kernels.grouped_experts import expert_products
from sft.megatron.parallel.experts import mark_as_experts


class ExpertAdapter(nn.Module):
    """A and B of one matrix of this rank's experts, those of an expert below those of the one before it."""

    def __init__(self, target: ExpertTarget, lora: LoraSpec, weight: Tensor, first: int, held: int) -> None:
        super().__init__()
        assert lora.rank is not None
        self._target, self._rank = target, lora.rank
        self._first = first
        """This rank's first expert, of `held`."""
        self.lora_A = nn.Parameter(weight.new_empty(held * lora.rank, target.columns))
        self.lora_B = nn.Parameter(weight.new_zeros(held * target.rows, lora.rank))
        for parameter in (self.lora_A, self.lora_B):
            mark_as_experts(parameter, split=0)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Set A to its initial values, the same under every topology, and B to zero: the model starts unchanged."""
        for own, values in enumerate(torch.split(self.lora_A, self._rank)):
            values.copy_(self._target.draw_a(self._first + own, self._rank, seed))
        self.lora_B.zero_()


class ExpertAdapters(nn.ModuleDict):
    """The adapters of one linear of experts, by the names of their targets."""

    def __init__(
        self, targets: Sequence[ExpertTarget], lora: LoraSpec, weight: Tensor, *, first: int, held: int
    ) -> None:
        super().__init__({target.key: ExpertAdapter(target, lora, weight, first, held) for target in targets})
        rows = held * sum(target.rows for target in targets)
        assert rows == len(weight), "gate and up projection have adapters together, or one"
        self._held = held
        self._scale = lora.scale

    def reset(self, seed: int) -> None:
        """Set all adapters to their initial values."""
        for part in self._parts():
            part.reset(seed)

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return what the adapters add to the output of rows that are sorted by expert."""
        parts = self._parts()
        down = torch.cat([part.lora_A.view(self._held, -1, part.lora_A.size(1)) for part in parts], 1)
        ranks = [part.lora_B.size(1) for part in parts]
        blocks = []
        for place, part in enumerate(parts):
            # Each matrix has columns of its own, as in a block diagonal.
            around = (sum(ranks[:place]), sum(ranks[place + 1 :]))
            blocks.append(F.pad(part.lora_B.view(self._held, -1, part.lora_B.size(1)), around))
        hidden = expert_products(rows, down, ends) * self._scale
        return expert_products(hidden, torch.cat(blocks, 1), ends)

    def _parts(self) -> list[ExpertAdapter]:
        return [part for part in self.values() if isinstance(part, ExpertAdapter)]
