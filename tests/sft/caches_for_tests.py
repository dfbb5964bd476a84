"""Small caches out of lists, for the tests of sampler, batch and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from sft.data.cache.store import Counts, TokenCache, assemble, write_part

Pair = tuple[list[int], list[float]]


def make_cache(directory: Path, pairs: list[Pair], per_part: int = 1000) -> TokenCache:
    """Make a cache of `pairs` of ids and weights, in parts of `per_part` examples."""
    directory.mkdir(parents=True)
    arrays = [(np.array(ids, dtype=np.int32), np.array(weights, dtype=np.float32)) for ids, weights in pairs]
    groups = [arrays[first : first + per_part] for first in range(0, len(arrays), per_part)]
    parts = [write_part(directory / f"part-{n}", group, Counts(rows=len(group))) for n, group in enumerate(groups)]
    assemble(directory, "key", parts)
    return TokenCache.open(directory)


def ragged_pairs(count: int, seed: int = 0, vocab: int = 50, longest: int = 12) -> list[Pair]:
    """Return `count` examples of 2 to `longest` tokens, drawn from the whole vocabulary, special ones included."""
    rng = np.random.default_rng(seed)
    pairs: list[Pair] = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        weights = rng.integers(0, 2, length).astype(float)
        weights[0], weights[-1] = 0.0, 1.0
        pairs.append((rng.integers(0, vocab, length).tolist(), weights.tolist()))
    return pairs
