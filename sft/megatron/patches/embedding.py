"""Changes to the vocabulary's embedding: a gradient that goes straight to its buffer, and a multiplier."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor, nn

from sft.kernels.embedding import lookup
from sft.kernels.gradient_buffer import leave_all_to_kernels
from sft.megatron.patches.patch import Patch


def multiply_embedding(model_chunk: GPTModel, multiplier: float, *, rounded: bool) -> None:
    """Multiply the first stage's embeddings, by a multiplier `rounded` to their number type as Gemma does.

    This is a forward hook because Megatron-core puts the embeddings into a wrapper for inference.
    """
    model_chunk.embedding.register_forward_hook(partial(_multiply, multiplier, rounded))


def _multiply(multiplier: float, rounded: bool, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
    factor = torch.tensor(multiplier, dtype=output.dtype, device="cpu") if rounded else multiplier
    return output * factor


def use_direct_lookup(model_chunk: GPTModel) -> None:
    """Replace the first stage's embedding lookup by one that adds rows to the gradient buffer."""
    if not model_chunk.pre_process:
        return
    layer = model_chunk.embedding.word_embeddings
    layer.forward = partial(_embed, layer)
    leave_all_to_kernels(layer.weight)


def _embed(layer: tensor_parallel.VocabParallelEmbedding, ids: Tensor) -> Tensor:
    """Return the embeddings of ids [b, s]: [b, s, h] or, with sequence parallelism, this rank's part of [s, b, h]."""
    rows = lookup(layer.weight, ids - layer.vocab_start_index, partial=layer.tp_group.size() > 1)
    if layer.reduce_scatter_embeddings:
        rows = rows.transpose(0, 1).contiguous()
        whole: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows, group=layer.tp_group)
    else:
        whole = tensor_parallel.reduce_from_tensor_model_parallel_region(rows, group=layer.tp_group)
    return whole


PATCH = Patch(
    name="embedding",
    why="autograd's gradient of a lookup is as large as the vocabulary: filled with zeros, and all of it added to the "
    "buffer, for each micro-batch",
    targets=("megatron.core.tensor_parallel:VocabParallelEmbedding.forward",),
    test="sft/kernels/test_embedding.py::test_gradient_is_added_to_the_buffer",
)
