"""Count the floating point operations of training, by one convention for planner, metrics and benchmarks.

Linear layers cost 6 * (non-embedding parameters + hidden * vocabulary) operations per token: 2 per parameter in the
forward pass and 4 in the backward pass. An embedding lookup costs nothing, the output layer its product, tied or not.

Attention costs 6 * layers * (heads * head size) * s operations per token, where s is the length of the token's own
example, packed or not. That is half of 12 * layers * hidden * s (Narayanan et al. 2021,
https://arxiv.org/abs/2104.04473, appendix), because with a causal mask a token attends to half of its example on
average. In layers with a sliding window w it attends to w - w^2 / 2s positions, where s is longer than w; s is then the
mean over all tokens. Linear attention costs 18 * value heads * key size * value size operations per token: 6 for each
number of its state (to read what it holds under the key, to update it, and to read it for the query), and three times
that with the backward pass.

With LoRA the frozen weights have no gradient of their own, and cost 4 operations each per token; adapters cost 6.

Only useful work counts: neither padding nor what is recomputed.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from launcher.contract.adapters import active_adapters
from launcher.contract.linears import attention_linears, expert_linears, layer_linears
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import LoraSpec

_ALL_WEIGHTS = LoraSpec()


def expert_parameters(shape: ModelShape) -> int:
    """Return the number of weights in all routed experts of one decoder layer."""
    return shape.num_experts * sum(each.weights for each in expert_linears(shape)) if shape.num_experts else 0


def active_expert_parameters(shape: ModelShape) -> int:
    """Return the number of weights in those routed experts of one decoder layer that a token goes to."""
    return expert_parameters(shape) // shape.num_experts * shape.experts_per_token


@lru_cache(maxsize=256)
def layer_matmul_parameters(
    shape: ModelShape, *, active: bool = False, dense: bool = False, linear: bool = False
) -> int:
    """Return the number of weights in one decoder layer's linears (q, k, v, output projection, MLP), without biases.

    In a mixture of experts, `active` counts only the experts that one token goes to, and `dense` is for a layer that
    has an MLP instead. `linear` is for a layer with linear attention.
    """
    found = sum(each.weights for each in layer_linears(shape, dense=dense, linear=linear))
    if not shape.num_experts or dense:
        return found
    return found + (active_expert_parameters if active else expert_parameters)(shape) + router_parameters(shape)


def router_parameters(shape: ModelShape) -> int:
    """Return the number of weights in one decoder layer's router, and in the vector that weights its shared expert."""
    return (shape.num_experts + shape.weighted_shared_expert) * shape.hidden_size


def whole_parameters(shape: ModelShape) -> int:
    """Return the number of weights in one decoder layer's linears that every tensor parallel rank has whole."""
    return sum(each.weights for each in attention_linears(shape) if each.place == "latents")


def attention_parameters(shape: ModelShape, *, linear: bool = False) -> int:
    """Return the number of weights in one decoder layer's projections of attention, or of linear attention."""
    return sum(each.weights for each in attention_linears(shape, linear=linear))


def non_embedding_parameters(shape: ModelShape, *, active: bool = False) -> int:
    """Return the number of weights in all linear layers and norms: in all but the embedding and the output layer."""
    dense, linear = len(shape.dense_layers), len(shape.linear_layers)
    layers = (shape.num_layers - dense) * layer_matmul_parameters(shape, active=active)
    layers += dense * layer_matmul_parameters(shape, dense=True)
    layers += (shape.num_layers - linear) * layer_norm_parameters(shape)
    if linear:
        layers += linear * (attention_parameters(shape, linear=True) - attention_parameters(shape))
        layers += linear * layer_norm_parameters(shape, linear=True)
    if shape.wide_heads is not None:
        wide = shape.for_layers(windowed=False)
        more = attention_parameters(wide) - attention_parameters(shape)
        more += layer_norm_parameters(wide) - layer_norm_parameters(shape)
        layers += (shape.num_layers - len(shape.windowed_layers)) * more
    return layers + shape.hidden_size


def layer_norm_parameters(shape: ModelShape, *, linear: bool = False) -> int:
    """Return the number of weights in one decoder layer's norms, and of scales in its router.

    Linear attention has a convolution and a few more.
    """
    if linear:
        assert shape.linear is not None
        return shape.layer_norms * shape.hidden_size + shape.linear.parameters
    scales = shape.hidden_size + shape.num_experts if shape.experts_beside_mlp else 0
    heads = 2 * shape.qk_norm + (shape.num_attention_heads + shape.num_query_groups) * shape.width_norm
    latents = 0 if shape.latent is None else shape.latent.normed
    return shape.layer_norms * shape.hidden_size + heads * shape.head_dim + latents + scales


def embedding_parameters(shape: ModelShape) -> int:
    """Return the number of weights in the embedding. The output layer has as many."""
    return shape.hidden_size * shape.vocab_size


def position_parameters(shape: ModelShape) -> int:
    """Return the number of weights in the table of learned positions, 0 where there is none."""
    return shape.hidden_size * shape.learned_positions


def parameters(shape: ModelShape) -> int:
    """Return the number of weights, without biases. A tied output layer counts once."""
    vocabulary = embedding_parameters(shape) * (1 if shape.tied_embeddings else 2)
    return non_embedding_parameters(shape) + vocabulary + position_parameters(shape)


def training_flops(shape: ModelShape, lengths: Iterable[int], lora: LoraSpec = _ALL_WEIGHTS) -> int:
    """Return the number of operations of forward and backward passes over examples of these lengths in tokens.

    If `lora` has a rank, only adapters are trained.
    """
    tokens = squares = 0
    for length in lengths:
        tokens += length
        squares += length * length
    return training_flops_of(shape, tokens, squares, lora)


def training_flops_of(shape: ModelShape, tokens: int, squared_lengths: int, lora: LoraSpec = _ALL_WEIGHTS) -> int:
    """Return what `training_flops` does, from sums over examples: `tokens` of s_i, `squared_lengths` of s_i^2.

    If `lora` has a rank, only adapters are trained.
    """
    weights = non_embedding_parameters(shape, active=True) + embedding_parameters(shape)
    adapted = lora.rank is not None
    products = tokens * (4 * weights + 6 * active_adapters(shape, lora) if adapted else 6 * weights)
    in_window = (
        min(squared_lengths, round(tokens * attended_in_window(shape, squared_lengths / tokens))) if tokens else 0
    )
    linear, windowed = len(shape.linear_layers), len(shape.windowed_layers)
    whole = (shape.num_layers - windowed - linear) * squared_lengths
    products += linear * tokens * linear_attention_flops(shape)
    widths = core_width(shape.for_layers(windowed=False)) * whole + core_width(shape) * windowed * in_window
    return products + 3 * widths


@lru_cache(maxsize=64)
def layer_operations(shape: ModelShape, length: int) -> tuple[int, ...]:
    """Return each layer's operations per token, forward and backward, for examples of `length` tokens."""
    found = []
    for index in range(shape.num_layers):
        linear, dense, windowed = (
            index in layers for layers in (shape.linear_layers, shape.dense_layers, shape.windowed_layers)
        )
        own = shape.for_layers(windowed=windowed)
        attended = attended_in_window(shape, length) if windowed else length
        attention = round(3 * core_width(own) * attended)
        products = 6 * layer_matmul_parameters(own, active=not dense, dense=dense, linear=linear)
        found.append(products + (linear_attention_flops(shape) if linear else attention))
    return tuple(found)


def core_width(shape: ModelShape) -> int:
    """Return the width of all heads' queries and values together, whose products attention's core consists of."""
    return shape.num_attention_heads * (shape.head_dim + shape.value_dim)


def head_operations(shape: ModelShape) -> int:
    """Return the output layer's operations per token, forward and backward."""
    return 6 * embedding_parameters(shape)


def linear_attention_flops(shape: ModelShape) -> int:
    """Return one layer's operations of linear attention per token, forward and backward, without its projections."""
    linear = shape.linear
    return 0 if linear is None else 18 * linear.value_heads * linear.key_dim * linear.value_dim


def attended_in_window(shape: ModelShape, length: float) -> float:
    """Return twice the mean number of positions that a token attends to in a layer with a window.

    `length` is that of the token's example. The factor 2 makes it comparable to `length` itself, of which a token sees
    half without a window.
    """
    if shape.window is None or length <= shape.window:
        return length
    return 2 * shape.window - shape.window**2 / length


def mfu(flops: float, seconds: float, peak_tflops: float, gpus: int = 1) -> float:
    """Return the model FLOPs utilization: useful operations over those that `gpus` could do at their dense peak."""
    return flops / (seconds * peak_tflops * 1e12 * gpus)
