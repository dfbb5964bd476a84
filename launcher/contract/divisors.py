"""Arithmetic of sizes that must divide each other, for rules and for the values that messages propose."""

from __future__ import annotations

from collections.abc import Iterable


def divisors(number: int) -> list[int]:
    """Return the divisors of a positive number, smallest first."""
    return [size for size in range(1, number + 1) if number % size == 0]


def rounded_up(number: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below `number`."""
    return -(-number // multiple) * multiple


def nearest_multiples(number: int, step: int) -> list[int]:
    """Return the multiples of `step` next below (or at) and above `number`, without 0."""
    below = number // step * step
    return [size for size in (below, below + step) if size]


def shown_numbers(numbers: Iterable[int]) -> str:
    """Return the numbers as a message lists them: the first twelve, or `none`."""
    numbers = list(numbers)
    if not numbers:
        return "none"
    return ", ".join(map(str, numbers[:12])) + (", ..." if len(numbers) > 12 else "")
