"""Floating point operations of training, by one convention for planner, metrics and benchmarks.

A token costs 6 * (non-embedding parameters + hidden * vocabulary): a product's forward pass is 2 operations a
parameter, its backward pass 4; looking up an embedding costs none, the output layer costs its product, tied or not.
Attention costs 6 * layers * (heads * head size) * s a token, s the length of the token's own example: half of
12 * layers * hidden * s (Narayanan et al. 2021, https://arxiv.org/abs/2104.04473, appendix), because a causal token
sees half of its example on average. An example of length s so costs 6 * layers * hidden * s^2, packed or not. Padding
counts for nothing, and neither does what recomputation does twice: MFU is about useful work.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.contract.model_shape import ModelShape


def layer_matmul_parameters(shape: ModelShape) -> int:
    """Weights of the linear layers in one decoder layer: q, k, v, output projection, MLP; biases are left out."""
    queries = shape.num_attention_heads * shape.head_dim
    keys_and_values = 2 * shape.num_query_groups * shape.head_dim
    attention = shape.hidden_size * (2 * queries + keys_and_values)
    return attention + (3 if shape.gated_mlp else 2) * shape.hidden_size * shape.ffn_hidden_size


def non_embedding_parameters(shape: ModelShape) -> int:
    """All weights but the embedding and the output layer: linear layers and the RMSNorms before and after them."""
    return shape.num_layers * (layer_matmul_parameters(shape) + 2 * shape.hidden_size) + shape.hidden_size


def embedding_parameters(shape: ModelShape) -> int:
    """Weights of the embedding, which the output layer's equal in number."""
    return shape.hidden_size * shape.vocab_size


def parameters(shape: ModelShape) -> int:
    """All weights; a tied output layer counts once."""
    return non_embedding_parameters(shape) + embedding_parameters(shape) * (1 if shape.tied_embeddings else 2)


def training_flops(shape: ModelShape, lengths: Iterable[int]) -> int:
    """Forward and backward of examples of these lengths in tokens."""
    tokens = squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    return training_flops_of(shape, tokens, squares)


def training_flops_of(shape: ModelShape, tokens: int, squared_lengths: int) -> int:
    """The same from sums over examples: `tokens` of s_i, `squared_lengths` of s_i^2."""
    products = 6 * tokens * (non_embedding_parameters(shape) + embedding_parameters(shape))
    return products + 6 * shape.num_layers * shape.num_attention_heads * shape.head_dim * squared_lengths


def mfu(flops: float, seconds: float, peak_tflops: float, gpus: int = 1) -> float:
    """Model FLOP utilization: useful operations over what `gpus` could do at their dense peak in that time."""
    return flops / (seconds * peak_tflops * 1e12 * gpus)
