"""Which copy in the nodes' memory ranks go on from, and where each of them gets its part. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sft.checkpoint.copy_parts import Part

_NAMED = 4
"""Number of ranks without a part that a reason names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """What a rank vouches for: parts on its node whose every byte it has compared."""

    node: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The copy to go on from."""

    step: int
    attempt: str
    """The attempt that made it."""
    parts: tuple[Part, ...]
    """By rank."""
    sources: tuple[int, ...]
    """By rank: a rank on whose node its part is; the rank itself where that is its own node."""

    @property
    def fetched(self) -> tuple[int, ...]:
        """The ranks whose part is on another node."""
        return tuple(rank for rank, source in enumerate(self.sources) if source != rank)


def choose(seen: Sequence[Seen]) -> Choice | str:
    """Return the copy of the newest step of which a part of every rank is there, or why there is none.

    `seen` is by rank. All parts are of one attempt: those of two may differ, as after a change of hands.
    """
    copies = {(part.step, part.attempt) for each in seen for part in each.parts}
    for step, attempt in sorted(copies, reverse=True):
        found = [_find(seen, rank, step, attempt) for rank in range(len(seen))]
        whole = [place for place in found if place is not None]
        if len(whole) == len(seen):
            parts, sources = zip(*whole, strict=True)
            return Choice(step=step, attempt=attempt, parts=parts, sources=sources)
    if not copies:
        return "no node has any copy that is whole"
    step, attempt = max(copies)
    lacking = [str(rank) for rank in range(len(seen)) if _find(seen, rank, step, attempt) is None]
    more = f" and {len(lacking) - _NAMED} more" if len(lacking) > _NAMED else ""
    ranks = f"{'rank' if len(lacking) == 1 else 'ranks'} {', '.join(lacking[:_NAMED])}{more}"
    return f"of the copy of step {step} no node has the part of {ranks}, and no older one is whole"


def _find(seen: Sequence[Seen], rank: int, step: int, attempt: str) -> tuple[Part, int] | None:
    """Return a rank's part of a copy and where it is, on the rank's own node if possible, or None."""
    places = [
        (part, holder)
        for holder, each in enumerate(seen)
        for part in each.parts
        if (part.step, part.attempt, part.rank) == (step, attempt, rank)
    ]
    own = [part for part, holder in places if seen[holder].node == seen[rank].node]
    return (own[0], rank) if own else next(iter(places), None)
