"""What a command knows that was typed on another machine: `launcher.remote.delivery` sends it, `launcher.arrived`
receives it.

The words of the command are the same on both sides; so a path in them is one of the other machine's where that file
was sent along, and is read from where it was put.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A command that was typed elsewhere."""

    cluster: str
    """The cluster whose host this is."""
    files: Mapping[str, str]
    """Path as written -> the copy that was sent."""
    source: Mapping[str, Any]
    """Git state of the code that was sent."""
    diff: str
    """Its uncommitted changes."""


_arrivals: list[Arrival] = []


def arrive(arrival: Arrival) -> None:
    """This process runs a command that was typed elsewhere."""
    _arrivals.append(arrival)


def arrival() -> Arrival | None:
    """The command from elsewhere that this process runs."""
    return _arrivals[-1] if _arrivals else None


def here(path: str) -> str:
    """The copy of a file that was sent along, or the path itself."""
    came = arrival()
    return came.files.get(path, path) if came is not None else path


def other_cluster(named: str | None) -> str | None:
    """The cluster of --cluster, unless that only said where the command runs."""
    came = arrival()
    return None if came is not None and named == came.cluster else named


def here_path(path: Path) -> Path:
    """`here` for a Path."""
    return Path(here(str(path)))
