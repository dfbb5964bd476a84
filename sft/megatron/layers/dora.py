"""DoRA's norms: the length of each row of a frozen weight W with its adapter, W + scale * B A.

No matrix of W's size is made: |W + s B A|^2 = |W|^2 + 2 s B . (W A^T) + s^2 B (A A^T) . B, row by row, and |W|^2 never
changes. Each term is a sum over columns, so ranks that hold parts of the columns add theirs up.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class RowNorms:
    """The norms of the rows that this rank holds, of one linear."""

    def __init__(self, scale: float, group: dist.ProcessGroup | None) -> None:
        self._scale = scale
        self._group = group
        """The ranks that hold parts of each row; None where each holds whole rows."""
        self._frozen: Tensor | None = None
        """|W|^2 of this rank's columns."""

    @torch.no_grad()
    def __call__(self, weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """Return the norms, fp32 [rows], of weight [rows, columns] with up [rows, r] and down [r, columns]."""
        if self._frozen is None or self._frozen.device != weight.device:
            self._frozen = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        b, a = up.float(), down.float()
        mixed = ((weight @ down.t()).float() * b).sum(1)
        own = ((b @ (a @ a.t())) * b).sum(1)
        squares = self._frozen + 2 * self._scale * mixed + self._scale**2 * own
        return self._summed(squares).sqrt()

    def _summed(self, squares: Tensor) -> Tensor:
        if self._group is None or self._group.size() == 1:
            return squares
        # The first norms are those of weights that are still on the host, where NCCL does not reach.
        on_gpu = dist.get_backend(self._group) == "nccl"
        whole = squares.cuda() if on_gpu else squares
        dist.all_reduce(whole, group=self._group)
        return whole.to(squares.device)
