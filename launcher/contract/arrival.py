"""What a command that was typed on another machine knows about that machine.

`launcher.remote.delivery` sends it and `launcher.arrived` receives it. The command line is the same on both sides, so a
path in it may name a file of the other machine. Such a file was sent along, and its copy is read instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True, slots=True)
class Arrival:
    """A command that was typed elsewhere."""

    cluster: str
    """The cluster whose host this is."""
    files: Mapping[str, str]
    """Path as written -> the copy that was sent."""
    source: Mapping[str, object]
    """Git state of the code that was sent."""
    diff: str
    """Its uncommitted changes."""


_arrivals: list[Arrival] = []


def arrive(arrival: Arrival) -> None:
    """Record that this process runs a command that was typed elsewhere."""
    _arrivals.append(arrival)


def arrival() -> Arrival | None:
    """Return the command from elsewhere that this process runs, if it does."""
    return _arrivals[-1] if _arrivals else None


def here(path: str) -> str:
    """Return the path of the copy if the file was sent along, else the path itself."""
    sent = arrival()
    return sent.files.get(path, path) if sent is not None else path


def other_cluster(named: str | None) -> str | None:
    """Return the value of --cluster, unless that only said on which host to run the command."""
    sent = arrival()
    return None if sent is not None and named == sent.cluster else named


def here_path(path: Path) -> Path:
    """Return `here` for a Path."""
    return Path(here(str(path)))
