"""Several sources as one set of training data.

Each source has its own token cache, so it is tokenized once, whatever it is mixed with and in which proportions. All
examples are numbered source after source. Only what schedules need to know about each example is joined in memory;
tokens stay in their caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.batches.mixture import Share
from sft.data.cache.store import TokenCache, TokenPair
from sft.data.prepared.data_sets import DataSet


@dataclass(frozen=True)
class Sources:
    """Examples of several caches, numbered cache after cache."""

    caches: tuple[TokenCache, ...]
    shares: tuple[Share, ...]
    """Name and part in an epoch of each."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, example: int) -> TokenPair:
        """Return ids and weights of one example, as views of its cache."""
        source, local = self.locate(example)
        return self.caches[source].tokens(local)

    def locate(self, example: int) -> tuple[int, int]:
        """Return the index of the source of an example, and the example's number there."""
        source = int(np.searchsorted(self._ends, example, side="right"))
        return source, example - int(self._ends[source - 1] if source else 0)

    def id_of(self, example: int) -> str:
        """Return the name of an example in records, `source:number`."""
        source, local = self.locate(example)
        return f"{self.shares[source].name}:{local}"

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example."""
        return np.concatenate([cache.lengths for cache in self.caches])

    @cached_property
    def target_weights(self) -> NDArray[np.float64]:
        """Sum of the target weights of each example."""
        return np.concatenate([cache.target_weights for cache in self.caches])

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        """Number of targets of each example with a weight other than 0."""
        return np.concatenate([cache.supervised for cache in self.caches])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(cache) for cache in self.caches])


def joined(sets: list[DataSet], caches: list[TokenCache], data: DataSpec) -> TokenCache | Sources:
    """Return the training data as one, or raise DataError if an epoch would take nothing of a source."""
    if not data.sources:
        return caches[0]
    pairs = zip(sets, caches, strict=True)
    shares = [Share(name=each.name, weight=data.sources[each.name].weight, examples=len(it)) for each, it in pairs]
    problems = [
        f"{each.key}.weight: {share.weight:g} x {share.examples:,} examples is {share.weight * share.examples:.3g}, "
        f"which rounds to 0: nothing of it would be trained. Give it at least 1 / (2 x {share.examples:,}) = "
        f"{0.5 / share.examples:.3g}, or remove the source"
        for each, share in zip(sets, shares, strict=True)
        if share.taken == 0
    ]
    if problems:
        raise DataError(problems)
    return Sources(tuple(caches), tuple(shares))
