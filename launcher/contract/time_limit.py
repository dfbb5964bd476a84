"""Time limits in Slurm's notation, which `resources.time` has for every scheduler."""

from __future__ import annotations


def time_limit_minutes(text: str | None) -> float | None:
    """Return the minutes in a time limit, or None for no limit."""
    if text is None or not text[:1].isdigit():
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MM[:SS]
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60


def as_time_limit(minutes: float) -> str:
    """Return minutes as H:MM:SS, which Slurm reads with any number of hours."""
    seconds = round(60 * minutes)
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
