"""The protocol by which a kernel adds a weight's gradient to the buffer that Megatron-core reduces.

Megatron-core's data parallelism gives each trained weight a view of a larger buffer (`main_grad`), in fp32 or in the
weight's type, and a flag (`grad_added_to_main_grad`). When a step begins the buffer is zeroed and the flag is False. A
backward pass that adds the gradient to the buffer itself sets the flag and gives autograd a tensor of undefined
content. Megatron-core's hook on the weight, which would add that tensor, sees the flag and does not. Autograd must get
a tensor all the same: without one the hook does not run, and it counts the finished gradients of a bucket.

Only this module reads and writes these attributes of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sft.kernels.products import add_product, set_product

_recording = False
"""Whether a CUDA graph is recorded now. Not a context variable: autograd runs backward passes in threads of its own."""


@contextmanager
def always_added() -> Iterator[None]:
    """Add to buffers also what comes first in a step, while a CUDA graph is recorded: any micro-batch may launch it.

    What autograd is given has no memory of its own meanwhile, since the graph would keep it.
    """
    global _recording
    _recording = True
    try:
        yield
    finally:
        _recording = False


class GradientBuffer:
    """The gradient buffer of one weight."""

    def __init__(self, weight: Tensor, values: Tensor) -> None:
        self._weight = weight
        self.values = values
        """The buffer itself, in the weight's shape."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added since the step began, so that the buffer is known to be all zeros."""
        return not (_recording or has_gradient(self._weight))

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b, which is a part of the gradient or all of it."""
        # Overwriting zeros with the step's first product saves reading them.
        (set_product if self.is_empty else add_product)(self.values, a, b)
        self.mark()

    def mark(self) -> None:
        """Say that something was added."""
        self._weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]

    def answer(self) -> Tensor:
        """Return what a backward pass gives autograd when all of the gradient has been added."""
        self.mark()
        if _recording:
            return self._weight.new_empty(()).expand_as(self._weight)
        return torch.empty_like(self._weight)


def buffer_of(weight: Tensor) -> GradientBuffer | None:
    """Return the buffer of a weight, None outside of Megatron-core's data parallelism and for frozen weights."""
    values: Tensor | None = getattr(weight, "main_grad", None)
    return None if values is None else GradientBuffer(weight, values)


def has_gradient(weight: Tensor) -> bool:
    """Return whether a kernel has added to the weight's buffer since the step began."""
    return bool(getattr(weight, "grad_added_to_main_grad", False))


def announce(weight: Tensor, hook: Callable[[], None]) -> None:
    """Call Megatron-core's hook on a weight whose gradient is in the buffer, however it came there.

    The hook counts the finished gradients of a bucket. It wants some gradient, and adds none to a flagged weight's
    buffer.
    """
    flag = has_gradient(weight)
    weight.grad, weight.grad_added_to_main_grad = weight.detach(), True  # type: ignore[attr-defined]
    hook()
    # As it was: autograd brings the gradients of a weight without kernels, and the hook must add the next one.
    weight.grad_added_to_main_grad = flag  # type: ignore[attr-defined]


def leave_all_to_kernels(weight: Tensor) -> None:
    """Let Megatron-core's hook obey the flag of a tied weight, too, whose lookup would else go through autograd."""
    weight.zero_out_wgrad = False  # type: ignore[attr-defined]
