"""The types of torch.autograd that its own stubs leave open."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """What `forward` leaves for `backward` in a torch.autograd.Function.

    A function that keeps more than tensors declares its own attributes in a protocol derived from this one.
    """

    saved_tensors: tuple[Tensor, ...]
    """What `save_for_backward` was given, in that order; None where it was given None."""
    needs_input_grad: tuple[bool, ...]
    """Whether autograd uses the gradient of each argument of `forward`."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep inputs and outputs of `forward`. Autograd raises an error if they were changed in place since."""
        ...

    def set_materialize_grads(self, value: bool) -> None:
        """Say whether `backward` gets zeros, or else None, for an output that nothing used."""
        ...

    def mark_non_differentiable(self, *outputs: Tensor) -> None:
        """Give these outputs no gradient."""
        ...
