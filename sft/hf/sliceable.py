"""What tensors are read through: an object that is indexed by the part that is wanted."""

from __future__ import annotations

from typing import Protocol

import torch


class Sliceable(Protocol):
    """A tensor of which only the part is read by which it is indexed."""

    def __getitem__(self, index: slice | tuple[int | slice, ...], /) -> torch.Tensor:
        """Return that part. Slices have no step."""
