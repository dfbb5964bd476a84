"""What tensors are read through: an object that is indexed by the part that is wanted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # what is checked before a rank starts needs no torch
    import torch


class Sliceable(Protocol):
    """A tensor of which only the part is read by which it is indexed."""

    def __getitem__(self, index: slice | tuple[int | slice, ...], /) -> torch.Tensor:
        """Return that part. Slices have no step."""
