"""Curves in a line of text, and the growing file that they are read from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from launcher.contract.records import is_number
from launcher.contract.rundir import record_in

_BARS = "▁▂▃▄▅▆▇█"
_NOTHING = "·"
"""Stands for numbers that are not finite."""


def sparkline(values: Sequence[float], width: int) -> str:
    """Return a curve of at most `width` characters, from the lowest bar for the least value to the highest.

    Where there are more values than characters, each shows the mean of its share of them.
    """
    if not values or width <= 0:
        return ""
    means = [_mean(part) for part in _shares(values, width)]
    finite = [value for value in means if value is not None]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(_NOTHING if value is None else _bar(value, low, high) for value in means)


def _shares(values: Sequence[float], width: int) -> list[Sequence[float]]:
    count = min(width, len(values))
    ends = [len(values) * number // count for number in range(count + 1)]
    return [values[begin:end] for begin, end in pairwise(ends)]


def _mean(part: Sequence[float]) -> float | None:
    finite = [value for value in part if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _bar(value: float, low: float, high: float) -> str:
    if high <= low:
        return _BARS[0]
    return _BARS[min(len(_BARS) - 1, int((value - low) / (high - low) * len(_BARS)))]


class GrowingCurves:
    """The numbers in a metrics.jsonl, of which each look reads only what was written since the one before."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._place: tuple[int, int] = (0, 0)
        """Number of the file on its disk, and how many bytes of it were read."""
        self._rest = b""
        self.numbers: dict[str, list[float]] = {}
        """Key of the file -> its values, oldest first."""

    def look(self) -> None:
        """Read what is new. An attempt that goes on replaces the file: then all of it is."""
        try:
            with self._file.open("rb") as stream:
                about = self._file.stat()
                number, done = self._place
                if about.st_ino != number or about.st_size < done:
                    self.numbers, self._rest, done = {}, b"", 0
                stream.seek(done)
                new = stream.read()
        except OSError:
            return
        self._place = (about.st_ino, done + len(new))
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            for key, value in (record_in(line.decode(errors="replace")) or {}).items():
                if is_number(value):
                    self.numbers.setdefault(key, []).append(float(value))
