"""Text for a terminal: columns, cut lines, durations."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as text, every column as wide as its widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def shortened(text: str, width: int) -> str:
    """Return a text of at most `width` characters, with an ellipsis where it was cut."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def terminal_width() -> int | None:
    """Return the terminal's width in characters, or None if the output is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def duration(seconds: float) -> str:
    """Format a duration as `1:02:03`, or as `2:03` below an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def local_time(moment: float) -> str:
    """Format a Unix time as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
