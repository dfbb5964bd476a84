"""How much of the communication nothing else hides, from the intervals in which kernels ran on one GPU."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time, as intervals that do not meet, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def busy(intervals: Iterable[Interval]) -> float:
    """Time in which at least one of them ran."""
    return sum(end - begin for begin, end in union(intervals))


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Time in which communication ran and no computation did."""
    communication, computation = list(communication), list(computation)
    return busy([*communication, *computation]) - busy(computation)
