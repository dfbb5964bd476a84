"""The runs of a folder by their files alone; asks no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from launcher.contract.errors import LauncherError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.snapshot import snapshot


class ListedRun(TypedDict):
    """A row of `launcher list`."""

    run: str
    directory: str
    state: str | None
    """By the run's own files; None while it is not known to have ended."""
    phase: str
    """How far its newest attempt has come."""
    created_at: float
    """Seconds since the epoch."""
    topology: str
    parent_run: str | None


def listing(runs: Sequence[RunPaths]) -> list[ListedRun]:
    """Return the rows of `launcher list`: name, state by the run's own files, creation time, topology, lineage."""
    rows: list[ListedRun] = []
    for paths in runs:
        try:
            item = snapshot(paths)
        except (LauncherError, ValueError, KeyError) as error:
            rows.append(_unreadable(paths, error))
            continue
        state = item.own_state or (JobState.CANCELLED if item.cancelled else None)
        rows.append(
            {
                "run": item.paths.name,
                "directory": str(item.paths.root),
                "state": state.value if state else None,
                "phase": item.phase,
                "created_at": item.manifest.created_at,
                "topology": item.manifest.topology.get("summary", ""),
                "parent_run": item.manifest.parent_run,
            }
        )
    return rows


def _unreadable(paths: RunPaths, error: Exception) -> ListedRun:
    """Return the row of a run whose files are damaged. The others are still listed."""
    return {
        "run": paths.name,
        "directory": str(paths.root),
        "state": JobState.UNKNOWN.value,
        "phase": "",
        "created_at": paths.root.stat().st_mtime,
        "topology": f"unreadable: {error}",
        "parent_run": None,
    }
