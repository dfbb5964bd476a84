"""Which rank failed first, and its last words: the others only report that it was gone.

The batch script (srun) and `launcher.contract.local_ranks` write `<exit code> <rank> <host>` into
logs/<attempt>/failure when the first rank fails, and never again in that attempt.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.contract.rank_error import RankError, read_error
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths

_TAIL_BYTES = 256 * 1024
_TAIL_LINES = 20
_SIGNAL = 128
"""Exit codes above it belong to processes that a signal ended."""
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")


@dataclass(frozen=True, slots=True)
class FirstFailure:
    """The first rank of an attempt to end with a code other than 0."""

    exit_code: int
    rank: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def first_failure(paths: RunPaths, attempt: str) -> FirstFailure | None:
    """Return the first failure of an attempt, or None where no rank is known to have failed."""
    try:
        code, rank, host = (paths.logs / attempt / "failure").read_text(encoding="utf-8").split()
        return FirstFailure(int(code), int(rank), host)
    except (OSError, ValueError):
        return None


def last_words(log: Path) -> str:
    """Return the last traceback in a log with those it was raised from, or the last lines where there is none."""
    lines = _end_of(log)
    if lines is None:
        return f"(no log {log.name})"
    starts = [number for number, line in enumerate(lines) if line.endswith(_TRACEBACK)]
    if not starts:
        return "\n".join(lines[-_TAIL_LINES:])
    first = len(starts) - 1
    while first > 0 and any(line.startswith(_CHAINED) for line in lines[starts[first] - 3 : starts[first]]):
        first -= 1
    return "\n".join(lines[starts[first] :])


def first_error(paths: RunPaths, attempt: str) -> RankError | None:
    """Return the error that the attempt's first failing rank recorded, or None where none is known to be the first."""
    error, failure = read_error(paths.error(attempt)), first_failure(paths, attempt)
    if error is not None and failure is not None and failure.exit_code > _SIGNAL and failure.rank != error.rank:
        return None  # a killed rank records no error, so this one is of a rank that failed after it
    return error


def newest_error(paths: RunPaths) -> RankError | None:
    """Return the error that the first failing rank of the newest attempt recorded, or None where there is none."""
    attempts = [str(event.get("attempt")) for event in read_events(paths) if event["event"] == "attempt_started"]
    return first_error(paths, attempts[-1]) if attempts else None


def last_lines(log: Path, count: int) -> str:
    """Return the last lines of a log, nothing where it cannot be read."""
    return "\n".join((_end_of(log) or [])[-count:])


def _end_of(log: Path) -> list[str] | None:
    """Return the lines at the end of a log, or None where it cannot be read."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return None
