"""The runs of a folder by their files alone; asks no scheduler."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.errors import LauncherError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.snapshot import snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedRun:
    """A row of `launcher list`."""

    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    state: JobState | None
    """By the run's own files; null while it is not known to have ended."""
    phase: str
    """How far its newest attempt has come."""
    created_at: float
    """Seconds since the epoch."""
    topology: str
    """The parallel sizes in one line."""
    parent_run: str | None
    """Directory of the run that it was made from."""


def listing(runs: Sequence[RunPaths]) -> list[ListedRun]:
    """Return the rows of `launcher list`: name, state by the run's own files, creation time, topology, lineage."""
    rows: list[ListedRun] = []
    for paths in runs:
        try:
            item = snapshot(paths)
        except (LauncherError, ValueError, KeyError) as error:
            rows.append(_unreadable(paths, error))
            continue
        rows.append(
            ListedRun(
                run=item.paths.name,
                directory=str(item.paths.root),
                state=item.own_state or (JobState.CANCELLED if item.cancelled else None),
                phase=item.phase,
                created_at=item.manifest.created_at,
                topology=item.manifest.topology.get("summary", ""),
                parent_run=item.manifest.parent_run,
            )
        )
    return rows


def _unreadable(paths: RunPaths, error: Exception) -> ListedRun:
    """Return the row of a run whose files are damaged. The others are still listed."""
    return ListedRun(
        run=paths.name,
        directory=str(paths.root),
        state=JobState.UNKNOWN,
        phase="",
        created_at=paths.root.stat().st_mtime,
        topology=f"unreadable: {error}",
        parent_run=None,
    )
