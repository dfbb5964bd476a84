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
from launcher.contract.spec import RunSpec, TrainSpec


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

    The output layer's product counts, for every token, and that the first layers of each chunk, or all, are computed
    again where the run recomputes them, or in fp8. Looking an embedding up is no product: it costs nothing here.
    """
    operations = layer_operations(shape, spec.data.seq_length)
    costs = tuple(share * each for share, each in zip(_shares_of_bf16(spec, shape), operations, strict=True))
    topology = spec.topology
    return split_by_cost(
        costs,
        4 * head_operations(shape),
        topology.pipeline_parallel,
        topology.virtual_pipeline,
        _recomputed_layers(spec.train, shape),
    )


def _recomputed_layers(train: TrainSpec, shape: ModelShape) -> int:
    """Return how many layers of each model chunk are computed again at most, from its first one on."""
    if train.recompute not in ("full", "offload"):
        return 0
    return shape.num_layers if train.recompute_layers is None else train.recompute_layers


def _shares_of_bf16(spec: RunSpec, shape: ModelShape) -> list[int]:
    """Return how many quarters of its time in bf16 each layer takes: three in fp8.

    Layers with experts count as in bf16 unless their products are in fp8 too. That of the output layer never is.
    """
    layers = spec.train.fp8.layers_in_fp8(shape.num_layers) if spec.train.precision == "fp8" else range(0)
    whole = set(shape.dense_layers) if shape.num_experts and not spec.train.fp8.experts else set(layers)
    return [3 if layer in layers and layer in whole else 4 for layer in range(shape.num_layers)]


@lru_cache(maxsize=1024)
def split_by_cost(costs: tuple[int, ...], head: int, stages: int, virtual: int, recomputed: int = 0) -> tuple[int, ...]:
    """Return how many layers each model chunk has, at least one.

    The costliest chunk costs as little as possible, the last one with the `head` behind its layers. The first
    `recomputed` layers of each chunk cost a third more. Among such splits it is one whose costs are most alike by the
    sum of their squares; among those the one whose last stage, which has the head, costs least; and among those the one
    with fewer layers in earlier chunks, which hold the activations of more micro-batches.
    """
    model_chunks, count = stages * virtual, len(costs)
    assert 0 < model_chunks <= count
    chunks = _chunk_costs(costs, head, recomputed)
    limit = _least_maximum(chunks, model_chunks)
    scale = 4 * (sum(costs) + head) + 1
    # rest[start] is the price of the chunks that have the layers from `start` on. The last chunk comes first.
    rest = [_price(own[-1], limit, scale, of_last=True) for own in chunks]
    rest.append(None)
    choices: list[list[int]] = []
    for chunk in reversed(range(model_chunks - 1)):
        rest, ends = _with_one_more(chunks, rest, limit, scale, of_last=chunk % stages == stages - 1)
        choices.append(ends)
    split, start = [], 0
    for ends in reversed(choices):
        split.append(ends[start] - start)
        start = ends[start]
    return (*split, count - start)


_ChunkCosts = Sequence[Sequence[int]]
"""By its first layer, the cost of each possible chunk: of that layer alone first, of all from it on last."""


def _chunk_costs(costs: Sequence[int], head: int, recomputed: int) -> _ChunkCosts:
    """Return what chunks cost, in thirds: the forward pass, which recomputed layers do again, is one third."""
    sums = (0, *accumulate(costs))
    found = []
    for start, before in enumerate(sums[:-1]):
        middle = min(start + recomputed, len(costs))
        again = sums[middle] - before
        own = [4 * (end - before) for end in sums[start + 1 : middle + 1]]
        own += [3 * (end - before) + again for end in sums[middle + 1 :]]
        own[-1] += 3 * head
        found.append(own)
    return found


def _with_one_more(
    table: _ChunkCosts, rest: Sequence[int | None], limit: int, scale: int, *, of_last: bool
) -> tuple[list[int | None], list[int]]:
    """Return the least prices with one chunk more in front, and where that chunk then ends, by its start."""
    best: list[int | None] = [None] * len(rest)
    ends = [0] * len(rest)
    for start, costs in enumerate(table):
        least: int | None = None
        for end, cost in enumerate(costs, start + 1):
            own, behind = _price(cost, limit, scale, of_last=of_last), rest[end]
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


def _least_maximum(table: _ChunkCosts, model_chunks: int) -> int:
    """Return the cost of the costliest chunk in the best split.

    Not by bisection with chunks filled greedily: a chunk of expensive layers alone can cost more than one with cheap
    layers before them, which are then those that are recomputed.
    """
    # least[start] is that of the chunks that have the layers from `start` on. The last chunk comes first.
    least = [own[-1] for own in table]
    impossible = 2 * table[0][-1]  # all layers recomputed cost at most a third more than none
    for _ in range(model_chunks - 1):
        least = [_least_from(own, least[start + 1 :], impossible) for start, own in enumerate(table)]
    return least[0]


def _least_from(costs: Sequence[int], behind: Sequence[int], impossible: int) -> int:
    """Return the least maximum of a chunk and those behind it, `impossible` where there are too few layers for them."""
    found = impossible
    for own, others in zip(costs, behind, strict=False):  # the longest chunk has none behind it
        if own >= found:
            break  # so have all that are longer
        if others < found:
            found = max(own, others)
    return found
