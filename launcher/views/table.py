"""Runs as a table for people: columns as wide as their widest cell, and as many as the terminal has room for."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from launcher.runs.state import RunStatus

_HEAD = ("RUN", "STATE", "ATTEMPT", "JOB", "STEP", "LOSS", "TOKENS/S", "MFU", "ETA", "CHECKPOINT", "REASON")
_DROPPED = ("ATTEMPT", "CHECKPOINT", "MFU", "JOB", "TOKENS/S", "LOSS", "ETA")
"""Columns that a narrow terminal goes without, the first first."""
_LEAST_REASON = 24


def table(rows: Sequence[RunStatus], width: int | None = None) -> str:
    """One line a run; at most `width` characters wide, if given."""
    lines = [_HEAD, *map(_cells, rows)]
    for name in _DROPPED:
        if width is None or _width_without_reason(lines) + _LEAST_REASON <= width:
            break
        if name in lines[0]:
            place = lines[0].index(name)
            lines = [(*line[:place], *line[place + 1 :]) for line in lines]
    text = columns(lines)
    return text if width is None else "\n".join(shortened(line, width) for line in text.splitlines())


def _width_without_reason(lines: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in list(zip(*lines, strict=True))[:-1])


def columns(lines: Sequence[Sequence[str]]) -> str:
    """Text columns as wide as their widest cell."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def shortened(text: str, width: int) -> str:
    """The text, or as much of it as fits."""
    return text if len(text) <= width else f"{text[: max(0, width - 1)]}…"


def terminal_width() -> int | None:
    """Columns of the terminal; None where the output is a file or a pipe, which get everything."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _cells(row: RunStatus) -> tuple[str, ...]:
    reason = [row.reason] if row.reason else []
    if row.expected_start:
        reason.append(f"expected to start {row.expected_start}")
    return (
        row.run,
        row.state.value,
        row.attempt or "-",
        row.job or "-",
        "-" if row.step is None else f"{row.step}/{row.max_steps or '?'}",
        "-" if row.loss is None else f"{row.loss:.4f}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        "-" if row.eta_seconds is None else duration(row.eta_seconds),
        row.checkpoint or "-",
        ", ".join(reason).replace("\n", "; "),
    )


def duration(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
