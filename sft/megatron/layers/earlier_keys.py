"""The cache of keys and values with which answers are generated token by token."""

from __future__ import annotations

from torch import Tensor

from sft.megatron.core import StaticInferenceContext


def with_earlier(
    key: Tensor, value: Tensor, context: StaticInferenceContext, layer_number: int
) -> tuple[Tensor, Tensor]:
    """Put keys and values of new positions into a layer's cache, and return those of all positions so far.

    Both have the same shape, [s, b, groups, dim].
    """
    memory = context.key_value_memory_dict
    if layer_number not in memory:
        size = (context.max_sequence_length, *key.shape[1:])
        memory[layer_number] = key.new_empty(size), value.new_empty(size)
    begin = context.sequence_len_offset
    end = begin + key.shape[0]
    keys, values = memory[layer_number]
    keys[begin:end], values[begin:end] = key, value
    return keys[:end], values[:end]
