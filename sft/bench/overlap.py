"""Compute how much communication is not hidden by computation, from the intervals of kernels on one GPU."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of the intervals, as disjoint intervals in order."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def busy(intervals: Iterable[Interval]) -> float:
    """Return the time in which at least one of them ran."""
    return sum(end - begin for begin, end in union(intervals))


def exposed(communication: Iterable[Interval], computation: Iterable[Interval]) -> float:
    """Return the time in which communication ran and computation did not."""
    communication, computation = list(communication), list(computation)
    return busy([*communication, *computation]) - busy(computation)
