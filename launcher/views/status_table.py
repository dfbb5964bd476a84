"""The table of `launcher status`: one line a run, as many columns as the terminal has room for."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.runs.state import RunStatus
from launcher.views.text import columns, duration, shortened

_HEAD = ("RUN", "STATE", "ATTEMPT", "JOB", "STEP", "LOSS", "TOKENS/S", "MFU", "ETA", "CHECKPOINT", "REASON")
_DROPPED = ("ATTEMPT", "CHECKPOINT", "MFU", "JOB", "TOKENS/S", "LOSS", "ETA")
"""Columns that a narrow terminal goes without, in the order in which they are given up."""
_LEAST_REASON = 24  # characters of REASON for which another column is given up


def status_table(rows: Sequence[RunStatus], width: int | None = None) -> str:
    """Return a header and one line a run, cut to `width` characters if one is given."""
    lines = [_HEAD, *map(_cells, rows)]
    for name in _DROPPED:
        if width is None or _width_without_reason(lines) + _LEAST_REASON <= width:
            break
        place = lines[0].index(name)
        lines = [(*line[:place], *line[place + 1 :]) for line in lines]
    text = columns(lines)
    return text if width is None else "\n".join(shortened(line, width) for line in text.splitlines())


def _width_without_reason(lines: Sequence[Sequence[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in list(zip(*lines, strict=True))[:-1])


def _cells(row: RunStatus) -> tuple[str, ...]:
    reason = [row.reason] if row.reason else []
    if row.expected_start:
        reason.append(f"expected to start {row.expected_start}")
    return (
        row.run,
        row.state.value,
        row.attempt or "-",
        str(row.job_id or row.job or "-"),
        "-" if row.step is None else f"{row.step}/{row.max_steps or '?'}",
        "-" if row.loss is None else f"{row.loss:.4f}",
        "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
        "-" if row.mfu is None else f"{row.mfu:.1%}",
        "-" if row.eta_seconds is None else duration(row.eta_seconds),
        row.checkpoint or "-",
        ", ".join(reason).replace("\n", "; "),
    )
