"""Inputs of recomputed layers on the host (`train.recompute: offload`); Megatron-core has it for some modules only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from sft.megatron.patches.patch import Patch


def offload_inputs(model_chunk: GPTModel) -> None:
    """Let what the decoder's recomputed layers keep for backward, their inputs, go to the host's memory."""
    model_chunk.decoder.forward = partial(_with_inputs_on_host, model_chunk.decoder.forward)


def _with_inputs_on_host(forward: Callable[..., Tensor], *args: object, **kwargs: object) -> Tensor:
    with torch.autograd.graph.save_on_cpu(pin_memory=True):
        return forward(*args, **kwargs)


PATCH = Patch(
    name="offloaded_inputs",
    why="Megatron-core keeps the inputs of recomputed layers on the device",
    targets=("megatron.core.transformer.transformer_block:TransformerBlock.forward",),
    test="parity/test_topologies.py::test_offload_sends_the_inputs_of_layers_and_little_more",
)
