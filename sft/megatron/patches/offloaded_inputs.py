"""Inputs of recomputed layers on the host (`train.recompute: offload`); Megatron-core has it for some modules only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sft.megatron.core import GPTModel


def offload_inputs(chunk: GPTModel) -> None:
    """Let what the decoder's recomputed layers keep for backward, their inputs, go to the host's memory."""
    chunk.decoder.forward = partial(_with_inputs_on_host, chunk.decoder.forward)


def _with_inputs_on_host(forward: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return forward(*args, **kwargs)
