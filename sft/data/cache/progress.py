"""Progress of a long step: a bar on a terminal, a line every few seconds in a log file.

A bar redraws itself with carriage returns, which would make one line of a million characters in a log file.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0
"""Time between two lines in a log. A step that takes less prints none."""


class Progress:
    """Count bytes up to `total` and, if `shown`, print the progress to stderr."""

    def __init__(self, title: str, total: int, *, shown: bool) -> None:
        self._title = title
        self._total = total
        self._done = 0
        self._bar: tqdm | None = None
        if shown and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, file=sys.stderr, mininterval=0.5)
        self._lines = shown and self._bar is None
        self._started = self._printed = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: int) -> None:
        """Count another `count` bytes as done."""
        self._done += count
        if self._bar is not None:
            self._bar.update(count)
        now = time.monotonic()
        if self._lines and now - self._printed >= LINE_SECONDS:
            self._printed = now
            print(self._line(now - self._started), file=sys.stderr, flush=True)

    def _line(self, seconds: float) -> str:
        left = seconds * (self._total - self._done) / max(self._done, 1)
        return (
            f"{self._title}: {100 * self._done / max(self._total, 1):.0f} % of {self._total / 1e6:,.0f} MB, "
            f"{self._done / 1e6 / seconds:.1f} MB/s, {left:,.0f} s left"
        )
