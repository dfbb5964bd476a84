"""How often an epoch holds the examples of each source.

An epoch takes round(weight * n) of the n examples of a source: so many whole copies, and a rest. The rest walks round
and round through one permutation of the source, each epoch from where the last one ended. So in any epochs that follow
each other no example is used more than once more often than another of its source, no rest holds one twice, and
which they are depends on nothing but the seed, the epoch and the source's name and size.

An epoch has places: those of the first source, then those of the second, and so on. The plan
(sft.data.batches.sampler) orders places; what stands in them is said here, for as many as are asked about.

Rejected: to draw the source of each example with probabilities (counts are then right on average only, and a small
source may be missed), to draw every epoch's rest anew (some examples are then never seen), and to carry what rounding
took away into the next epoch (epochs would differ in length).
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
    """A source and its part in an epoch."""

    name: str
    weight: float
    examples: int
    """Examples that the source has."""

    @property
    def taken(self) -> int:
        """Examples that an epoch takes: weight * examples to the nearest whole number, a half up.

        The weight is the decimal fraction that was written, not its nearest float: 0.15 of 10 is 1.5, and so 2.
        """
        return math.floor(Fraction(repr(self.weight)) * self.examples + Fraction(1, 2))

    @property
    def copies(self) -> int:
        """Times that an epoch takes all examples."""
        return self.taken // self.examples

    @property
    def rest(self) -> int:
        """Examples that an epoch takes once more than the others."""
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
        """Examples of an epoch, those that come again counted again."""
        return sum(share.taken for share in self.shares)

    @property
    def varies(self) -> bool:
        """Whether one epoch holds other examples than another."""
        return any(share.rest for share in self.shares)

    def examples(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Example ids in these places of an epoch."""
        found = np.empty(len(places), dtype=np.int64)
        source_of = np.searchsorted(self._ends, places, side="right")
        first_place = first_example = 0
        for index, share in enumerate(self.shares):
            mine = source_of == index
            found[mine] = first_example + self._local(index, epoch, places[mine] - first_place)
            first_place += share.taken
            first_example += share.examples
        return found

    def _local(self, index: int, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands in a source's own places, as ids of its own."""
        share = self.shares[index]
        local = places % share.examples
        behind = places >= share.copies * share.examples
        local[behind] = self._walks[index][(local[behind] + epoch * share.rest) % share.examples]
        return local

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([share.taken for share in self.shares])

    @cached_property
    def _walks(self) -> list[NDArray[np.int64]]:
        """The order in which rests are taken from each source, where there are any."""
        return [self._walk(share) for share in self.shares]

    def _walk(self, share: Share) -> NDArray[np.int64]:
        if not share.rest:
            return np.zeros(0, dtype=np.int64)
        if not self.shuffle:
            return np.arange(share.examples, dtype=np.int64)
        stream = int.from_bytes(hashlib.sha256(share.name.encode()).digest()[:8], "little")
        return permutation(share.examples, [self.seed % 2**64, 0, stream])


def permutation(count: int, entropy: Sequence[int]) -> NDArray[np.int64]:
    """A permutation that depends on nothing but its arguments.

    numpy keeps the raw stream of a bit generator the same in all versions, which it does not promise for
    Generator.permutation; a run that is resumed after an upgrade must go on in the same order.
    """
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
    return np.argsort(raw, kind="stable").astype(np.int64, copy=False)
