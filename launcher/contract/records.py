"""The records of a run as its readers need them, without what a crash, a full disk or a copy has damaged.

An event has a name and a time, a line of metrics has a step and numbers, progress has numbers under its known names.
What is otherwise is left out here, so that no reader has to expect it.
"""

from __future__ import annotations

from typing import TypeGuard

from launcher.contract.rundir import JsonObject, RunPaths, read_json, read_lines

_FAR_FUTURE = 1e11
"""Seconds since the epoch; no event is that late, and no calendar that is asked for its date fails before."""
_TEXTS = ("attempt", "checkpoint")
"""Keys of progress.json that hold texts; all others hold numbers."""


def read_events(paths: RunPaths) -> list[JsonObject]:
    """Return the events of a run, oldest first, each with a text `event` and a `time` in seconds since the epoch."""
    return [
        record
        for record in read_lines(paths.events)
        if isinstance(record.get("event"), str) and is_number(record.get("time")) and 0 <= record["time"] < _FAR_FUTURE
    ]


def read_metrics(paths: RunPaths) -> list[JsonObject]:
    """Return the lines of metrics.jsonl, each with a whole `step` and otherwise only numbers."""
    lines = []
    for record in read_lines(paths.metrics):
        numbers = {name: value for name, value in record.items() if is_number(value)}
        if isinstance(numbers.get("step"), int):
            lines.append(numbers)
    return lines


def read_progress(paths: RunPaths) -> JsonObject:
    """Return the newest numbers of a run, nothing where there are none that can be read."""
    try:
        values = read_json(paths.progress)
    except (ValueError, RecursionError, OSError):
        return {}
    if not isinstance(values, dict):
        return {}
    return {
        name: value
        for name, value in values.items()
        if (isinstance(value, str) if name in _TEXTS else is_number(value))
    }


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a value is a number that a float can hold, NaN and infinities included."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)
