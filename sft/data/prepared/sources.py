"""The data sets that a config names, and training data of several sources as one.

Each source has a token cache of its own, so that it is tokenized once, whatever it is mixed with and in which
proportions. Together their examples are numbered source after source. Only what plans need of each example is joined;
tokens stay where they are.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from launcher.contract.errors import DataError
from launcher.contract.spec import DataSpec
from sft.data.batches.mixture import Share
from sft.data.cache.store import TokenCache, TokenPair


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Files that are read in the same way and make one cache."""

    name: str
    key: str
    """How errors name it."""
    data: DataSpec
    """How it is read, with its files as `train`."""


def training_sets(data: DataSpec) -> list[DataSet]:
    """The sources, or data.train as the only one; DataError where there is neither."""
    if data.sources:
        return [DataSet(name=name, key=f"data.sources.{name}", data=data.of_source(name)) for name in data.sources]
    if not data.train:
        raise DataError("data.train: no files")
    return [DataSet(name="train", key="data.train", data=data)]


def held_out_sets(data: DataSpec) -> list[DataSet]:
    """data.validation, where there is any."""
    held_out = dataclasses.replace(data, train=data.validation, sources={})
    return [DataSet(name="validation", key="data.validation", data=held_out)] if data.validation else []


@dataclass(frozen=True)
class Sources:
    """Examples of several caches, numbered cache after cache."""

    caches: tuple[TokenCache, ...]
    shares: tuple[Share, ...]
    """Name and part of each."""

    def __len__(self) -> int:
        return int(self._ends[-1])

    def tokens(self, example: int) -> TokenPair:
        """Ids and weights of one example, as views."""
        source, local = self.locate(example)
        return self.caches[source].tokens(local)

    def locate(self, example: int) -> tuple[int, int]:
        """Index of the source of an example, and its number there."""
        source = int(np.searchsorted(self._ends, example, side="right"))
        return source, example - int(self._ends[source - 1] if source else 0)

    def id_of(self, example: int) -> str:
        """The name of an example in records: its source, and its number there."""
        source, local = self.locate(example)
        return f"{self.shares[source].name}:{local}"

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.concatenate([cache.lengths for cache in self.caches])

    @cached_property
    def target_weights(self) -> NDArray[np.float64]:
        """Sum of each example's target weights."""
        return np.concatenate([cache.target_weights for cache in self.caches])

    @cached_property
    def supervised(self) -> NDArray[np.int64]:
        """Number of each example's targets with a weight other than 0."""
        return np.concatenate([cache.supervised for cache in self.caches])

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([len(cache) for cache in self.caches])


def joined(sets: list[DataSet], caches: list[TokenCache], data: DataSpec) -> TokenCache | Sources:
    """The training data as one; DataError where nothing would be taken of a source."""
    if not data.sources:
        return caches[0]
    pairs = zip(sets, caches, strict=True)
    shares = [Share(name=each.name, weight=data.sources[each.name].weight, examples=len(it)) for each, it in pairs]
    problems = [
        f"{each.key}.weight: {share.weight:g} x {share.examples:,} examples is {share.weight * share.examples:.3g}, "
        f"which rounds to 0: nothing of it would be trained. Give it at least 1 / (2 x {share.examples:,}) = "
        f"{0.5 / share.examples:.3g}, or take it out"
        for each, share in zip(sets, shares, strict=True)
        if share.taken == 0
    ]
    if problems:
        raise DataError(problems)
    return Sources(tuple(caches), tuple(shares))
