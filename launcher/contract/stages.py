"""Share a model's layers out over the model chunks of pipeline stages, by what each layer costs.

A stage has one model chunk, or as many as there are virtual stages. Chunks are in the model's order: the first chunk of
every stage, then the second of every stage. Costs are whole numbers, so that every machine finds the same split.

Rejected: Megatron-core's `num_layers_in_first_pipeline_stage` and `account_for_embedding_in_pipeline_split`. With them
all stages in between have equally many layers, and most numbers of layers still go with few numbers of stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

from launcher.contract.flops import head_operations, layer_operations
from launcher.contract.model_shape import ModelShape
from launcher.contract.spec import RunSpec


def even_split(layers: int, model_chunks: int) -> tuple[int, ...]:
    """Return equally many layers for each model chunk, or () where they do not divide."""
    return () if not model_chunks or layers % model_chunks else (layers // model_chunks,) * model_chunks


@lru_cache(maxsize=1024)
def chunk_ranges(split: tuple[int, ...]) -> tuple[range, ...]:
    """Return the layers of each model chunk, counted from 0 in the whole model."""
    ends = list(accumulate(split))
    return tuple(range(end - size, end) for size, end in zip(split, ends, strict=True))


def balanced_split(spec: RunSpec, shape: ModelShape) -> tuple[int, ...]:
    """Return how many layers each model chunk of the run has if the costliest of them costs as little as possible.

    The output layer's product counts, for every token, and that layers are computed again where the run recomputes
    them, or in fp8. Looking an embedding up is no product: it costs nothing here.
    """
    # The forward pass is a third of both passes together.
    layer, head = (4, 3) if spec.train.recompute in ("full", "offload") else (1, 1)
    operations = layer_operations(shape, spec.data.seq_length)
    costs = tuple(layer * share * each for share, each in zip(_shares_of_bf16(spec, shape), operations, strict=True))
    topology = spec.topology
    return split_by_cost(
        costs, 4 * head * head_operations(shape), topology.pipeline_parallel, topology.virtual_pipeline
    )


def _shares_of_bf16(spec: RunSpec, shape: ModelShape) -> list[int]:
    """Return how many quarters of its time in bf16 each layer takes: three in fp8, but for layers whose MLP is experts.

    Their products are never in fp8, and neither is that of the output layer.
    """
    layers = spec.train.fp8.layers_in_fp8(shape.num_layers) if spec.train.precision == "fp8" else range(0)
    dense = set(range(shape.num_layers)) if not shape.num_experts else set(shape.dense_layers)
    return [3 if layer in layers and layer in dense else 4 for layer in range(shape.num_layers)]


@lru_cache(maxsize=1024)
def split_by_cost(costs: tuple[int, ...], head: int, stages: int, virtual: int) -> tuple[int, ...]:
    """Return how many layers each model chunk has, at least one.

    The costliest chunk costs as little as possible, the last one with the `head` behind its layers. Among such splits
    it is one whose costs are most alike by the sum of their squares; among those the one whose last stage, which has
    the head, costs least; and among those the one with fewer layers in earlier chunks, which hold the activations of
    more micro-batches.
    """
    model_chunks, count = stages * virtual, len(costs)
    assert 0 < model_chunks <= count
    limit = _least_maximum(costs, head, model_chunks)
    sums = (0, *accumulate(costs))
    scale = sums[count] + head + 1
    # rest[start] is the price of the chunks that have the layers from `start` on. The last chunk comes first.
    rest = [_price(sums[count] - sums[start] + head, limit, scale, of_last=True) for start in range(count)]
    rest.append(None)
    choices: list[list[int]] = []
    for chunk in reversed(range(model_chunks - 1)):
        rest, ends = _with_one_more(sums, rest, limit, scale, of_last=chunk % stages == stages - 1)
        choices.append(ends)
    split, start = [], 0
    for ends in reversed(choices):
        split.append(ends[start] - start)
        start = ends[start]
    return (*split, count - start)


def _with_one_more(
    sums: Sequence[int], rest: Sequence[int | None], limit: int, scale: int, *, of_last: bool
) -> tuple[list[int | None], list[int]]:
    """Return the least prices with one chunk more in front, and where that chunk then ends, by its start."""
    best: list[int | None] = [None] * len(rest)
    ends = [0] * len(rest)
    for start in range(len(rest) - 1):
        least: int | None = None
        for end in range(start + 1, len(rest)):
            own, behind = _price(sums[end] - sums[start], limit, scale, of_last=of_last), rest[end]
            if own is None:
                break
            if behind is not None and (least is None or own + behind < least):
                least, ends[start] = own + behind, end
        best[start] = least
    return best, ends


def _price(cost: int, limit: int, scale: int, *, of_last: bool) -> int | None:
    """Return the square of a chunk's cost and, of far less weight, the cost itself on the last stage.

    None above the limit.
    """
    if cost > limit:
        return None
    return cost * cost * scale + (cost if of_last else 0)


def _least_maximum(costs: Sequence[int], head: int, model_chunks: int) -> int:
    """Return the cost of the costliest chunk in the best split, by bisection."""
    low, high = max(*costs, costs[-1] + head), sum(costs) + head
    while low < high:
        middle = (low + high) // 2
        if _fits(costs, head, model_chunks, middle):
            high = middle
        else:
            low = middle + 1
    return low


def _fits(costs: Sequence[int], head: int, model_chunks: int, limit: int) -> bool:
    """Return whether no chunk need cost more than `limit`, which is at least the cost of each layer."""
    needed, filled = 1, head
    # From the last layer, whose chunk has the head. Fewer chunks than there are can always be cut further.
    for cost in reversed(costs):
        if filled + cost > limit:
            needed, filled = needed + 1, 0
        filled += cost
    return needed <= model_chunks
