"""Shares of a run's length as numbers of optimizer steps."""

from __future__ import annotations

import math
from fractions import Fraction


def share_of_steps(share: float, steps: int) -> int:
    """Return `share` x `steps`, rounded up to whole steps."""
    # Of the decimal number as written, not the nearest float: 0.07 * 100 would be a little above 7, and 8 steps.
    return math.ceil(Fraction(repr(share)) * steps)
