"""Types of options on the command line, for argparse."""

from __future__ import annotations

import argparse
import contextlib


def count(word: str) -> int:
    """Return a whole number above 0, or raise ArgumentTypeError."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"{word!r} is not a whole number above 0")
    return int(word)


def seconds(word: str) -> float:
    """Return a number of at least 0, or raise ArgumentTypeError."""
    with contextlib.suppress(ValueError):
        if (number := float(word)) >= 0:
            return number
    raise argparse.ArgumentTypeError(f"{word!r} is not a number of seconds")
