"""The functions between the products of MLPs and experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

from sft.models.architecture import Activation


def squared_relu(x: Tensor) -> Tensor:
    """Return the square of ReLU."""
    return F.relu(x).square()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "relu2": squared_relu,
}
