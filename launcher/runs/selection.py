"""Selects runs of a folder by name, group, age and state."""

from __future__ import annotations

import fnmatch
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from launcher.contract.errors import ConfigError, LauncherError, did_you_mean
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths

_UNITS = {"m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_DATES = ("%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S")


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which runs a command shows. A field that is not set selects all."""

    name: str | None = None
    """Shell pattern of the name."""
    group: str | None = None
    """Name of the sweep's group."""
    since: float | None = None
    """Created at this time (seconds since the epoch) or later."""
    states: frozenset[JobState] = frozenset()

    def of(self, runs: Iterable[RunPaths]) -> list[RunPaths]:
        """Return the runs whose name, group and age match. A run whose age cannot be read is kept, to be seen."""
        named = [paths for paths in runs if self.name is None or fnmatch.fnmatchcase(paths.name, self.name)]
        if self.group is not None:
            named = [paths for paths in named if _group(paths) == self.group]
        return [paths for paths in named if self.since is None or _created_at(paths) >= self.since]

    def fits(self, state: JobState | None) -> bool:
        """Return whether runs in this state are selected."""
        return not self.states or state in self.states


def _group(paths: RunPaths) -> str | None:
    try:
        return read_manifest(paths).group
    except LauncherError:
        return None


def _created_at(paths: RunPaths) -> float:
    try:
        return read_manifest(paths).created_at
    except LauncherError:
        return float("inf")


def parse_since(text: str) -> float:
    """Return the time (in seconds since the epoch) `90m`, `12h`, `3d`, `2w` ago, or of a date, `2026-11-24T18:30`."""
    match = re.fullmatch(r"([0-9]{1,6})([mhdw])", text)
    if match is not None:
        return time.time() - int(match[1]) * _UNITS[match[2]]
    for form in _DATES:
        try:
            return time.mktime(time.strptime(text, form))
        except (ValueError, OverflowError):
            continue
    raise ConfigError(f"--since {text}: write how long ago (90m, 12h, 3d, 2w) or a date (2026-11-24, 2026-11-24T18:30)")


def parse_states(words: Sequence[str]) -> frozenset[JobState]:
    """Return the states in `running,pending`."""
    names = [name.strip().upper() for word in words for name in word.split(",")]
    known = [state.value for state in JobState]
    for name in names:
        if name not in known:
            raise ConfigError(f"--state {name}: no such state{did_you_mean(name, known)}; known: {', '.join(known)}")
    return frozenset(map(JobState, names))
