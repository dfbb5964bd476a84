"""Decide how often an epoch takes each example of several weighted sources.

An epoch takes round(weight * n) of the n examples of a source: a number of whole copies, and a rest. The rest moves
through one fixed permutation of the source, each epoch from where the last one ended, and starts over at its end. So:

* Over any consecutive epochs, two examples of a source are used equally often, or one of them once more.
* No rest holds an example twice.
* The choice depends only on the seed, the epoch, and the source's name and size.

An epoch is a list of places, those of the first source, then those of the second, and so on. A schedule
(sft.data.batches.sampler) puts the places in order; this module says which examples are at any of them.

Rejected: choosing the source of each example at random (counts are right only on average, and a small source may be
missed), choosing each epoch's rest at random (some examples may never be seen), and carrying the rounding error into
the next epoch (epochs would differ in length).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """A source, and its part in an epoch."""

    name: str
    weight: float
    examples: int
    """Examples that the source has."""

    @property
    def taken(self) -> int:
        """Examples that an epoch takes: weight * examples, rounded to the nearest integer, halves up."""
        # With the decimal number as written, not the nearest float: 0.15 * 10 is 1.5, which rounds to 2.
        return math.floor(Fraction(repr(self.weight)) * self.examples + Fraction(1, 2))

    @property
    def copies(self) -> int:
        """How often an epoch takes all examples."""
        return self.taken // self.examples

    @property
    def rest(self) -> int:
        """Examples that an epoch takes once more than the rest of the source."""
        return self.taken % self.examples


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixture:
    """The examples of every epoch of several sources, numbered source after source."""

    shares: tuple[Share, ...]
    seed: int
    shuffle: bool
    """Whether rests walk through a permutation, or through the source as it is."""

    @property
    def size(self) -> int:
        """Examples that an epoch takes, repeated ones counted again."""
        return sum(share.taken for share in self.shares)

    @property
    def varies(self) -> bool:
        """Whether epochs take different examples."""
        return any(share.rest for share in self.shares)

    def examples(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the example ids at these places of an epoch."""
        ids = np.empty(len(places), dtype=np.int64)
        source_of = np.searchsorted(self._ends, places, side="right")
        first_place = first_example = 0
        for index, share in enumerate(self.shares):
            mine = source_of == index
            ids[mine] = first_example + self._local(index, epoch, places[mine] - first_place)
            first_place += share.taken
            first_example += share.examples
        return ids

    def _local(self, index: int, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the examples at a source's own places (from 0), as its own ids: first the copies, then the rest."""
        share = self.shares[index]
        local = places % share.examples
        in_rest = places >= share.copies * share.examples
        local[in_rest] = self._walks[index][(local[in_rest] + epoch * share.rest) % share.examples]
        return local

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([share.taken for share in self.shares])

    @cached_property
    def _walks(self) -> list[NDArray[np.int64]]:
        """The order in which the rests of each source are taken, empty for a source without a rest."""
        return [self._walk(share) for share in self.shares]

    def _walk(self, share: Share) -> NDArray[np.int64]:
        if not share.rest:
            return np.zeros(0, dtype=np.int64)
        if not self.shuffle:
            return np.arange(share.examples, dtype=np.int64)
        # By name, so that adding a source does not change the order of another. `hash` changes with each process.
        stream = int.from_bytes(hashlib.sha256(share.name.encode()).digest()[:8], "little")
        return permutation(share.examples, [self.seed % 2**64, 0, stream])


def permutation(count: int, entropy: Sequence[int]) -> NDArray[np.int64]:
    """Return a random permutation of `count` places that depends only on the arguments."""
    # Not Generator.permutation: numpy promises the same stream in all versions only for the raw bit generator, and a
    # run that is resumed after an upgrade must go on in the same order.
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
