"""The vocabulary's embedding with a gradient that goes straight to its buffer."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from sft.kernels.embedding import lookup
from sft.megatron.core import GPTModel, tensor_parallel


def use_direct_lookup(chunk: GPTModel) -> None:
    """Let the first stage look tokens up by `lookup`; of a weight that is the LM head too both gradients go one way."""
    if not chunk.pre_process:
        return
    layer = chunk.embedding.word_embeddings
    layer.forward = partial(_embed, layer)
    layer.weight.zero_out_wgrad = False  # set for a tied weight, and lets a hook add what autograd was answered


def _embed(layer: tensor_parallel.VocabParallelEmbedding, ids: Tensor) -> Tensor:
    """Megatron-core's forward pass around the lookup: ids [b, s] -> [b, s, h], or this rank's share [s, b, h]."""
    found = lookup(layer.weight, ids - layer.vocab_start_index, partial=layer.tp_group.size() > 1)
    if layer.reduce_scatter_embeddings:
        rows = found.transpose(0, 1).contiguous()
        whole: Tensor = tensor_parallel.reduce_scatter_to_sequence_parallel_region(rows, group=layer.tp_group)
    else:
        whole = tensor_parallel.reduce_from_tensor_model_parallel_region(found, group=layer.tp_group)
    return whole
