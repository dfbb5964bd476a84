"""The race of a run that was submitted several times (`submit --first-of`): the first of its jobs to start has the run.

    RUN/candidates/<name>/   config.yaml and job.sh of each candidate: a cluster, or a partition
    RUN/winner.json          which candidate has won

The job that holds the run's lease decides the race, once and for good: it makes winner.json, which nobody replaces, and
puts its own config in the place of the run's. Later jobs of the run start from the winner's script. A job of another
candidate that starts all the same, even after the winner has ended and its lease is gone, finds the file and does not
touch the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from launcher.contract.errors import RunStateError
from launcher.contract.rundir import JsonObject, RunPaths, read_json, sync_path, write_atomic


def candidate_paths(paths: RunPaths, candidate: str) -> RunPaths:
    """Return where the config and the script of a candidate are, under the names that a run has for them."""
    return RunPaths(paths.candidates / candidate)


def winner(paths: RunPaths) -> str | None:
    """Return the candidate that has won, or None while none has. RunStateError where the file cannot be read."""
    try:
        found = read_json(paths.winner)
        return None if found is None else str(found["candidate"])
    except (ValueError, TypeError, KeyError) as error:
        raise RunStateError(f"{paths.winner} cannot be read: {error}") from None


def decide(paths: RunPaths, candidate: str, job_id: str) -> str:
    """Make `candidate` the winner, unless there is one, and return the winner. The caller holds the run's lease."""
    text = json.dumps({"candidate": candidate, "job_id": job_id}) + "\n"
    handle, temporary = tempfile.mkstemp(prefix=".winner.", dir=paths.root)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(temporary, paths.winner)  # whole or not at all, and never in the place of another one
    finally:
        os.unlink(temporary)
    sync_path(paths.root)
    return winner(paths) or candidate


def install(paths: RunPaths, candidate: str) -> None:
    """Put the winner's config in the place of the run's. The caller holds the run's lease."""
    text = candidate_paths(paths, candidate).config.read_text(encoding="utf-8")
    if text != paths.config.read_text(encoding="utf-8"):
        write_atomic(paths.config, text)


def script_of(paths: RunPaths) -> Path:
    """Return the script by which a run goes on: its own, or that of the candidate that has won its race."""
    won = winner(paths)
    return paths.script if won is None else candidate_paths(paths, won).script


def entries(events: Sequence[Mapping[str, object]]) -> dict[str, JsonObject]:
    """Return candidate -> the event of its submission, in the order of their submissions."""
    submitted = (event for event in events if event.get("event") == "submitted")
    return {str(event["candidate"]): dict(event) for event in submitted if event.get("candidate")}
