"""Which log files of a run are meant: of which attempt, of which ranks.

`batch.log` has the output of the single processes (prepare, export) and how the ranks ended; `rank-<N>.log` has the
output of rank N.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError, did_you_mean
from launcher.contract.rundir import RunPaths
from launcher.runs.snapshot import snapshot


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What the user wants to see. Without any choice it is rank 0 of the newest attempt."""

    ranks: tuple[int, ...] = ()
    all_ranks: bool = False
    batch: bool = False
    failed: bool = False
    """Only the last words of the rank that failed first."""
    attempt: str | None = None
    """None: the newest."""

    @property
    def several(self) -> bool:
        """Whether lines of several ranks are shown together, and need a prefix to be told apart."""
        return len(self.ranks) > 1 or self.all_ranks


def parse_ranks(text: str) -> tuple[int, ...]:
    """Parse `0,3-5` into (0, 3, 4, 5), or raise ConfigError."""
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ConfigError(f"--rank {text}: {part!r} is not a rank; write numbers and ranges, e.g. 0,3-5")
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(ranks))


def chosen_attempt(paths: RunPaths, wanted: str | None) -> str | None:
    """Return the attempt asked for, or the newest that has started, if any has."""
    if wanted is None:
        return snapshot(paths).attempt
    known = [path.name for path in paths.logs.iterdir() if path.is_dir()] if paths.logs.is_dir() else []
    if wanted not in known:
        near = did_you_mean(wanted, known)
        raise RunStateError(f"run {paths.name} has no attempt {wanted!r}{near}; it has {', '.join(known) or 'none'}")
    return wanted


def main_file(paths: RunPaths, attempt: str, choice: Choice) -> Path:
    """Return the one file to show where the choice is not of several ranks."""
    return batch_log(paths, attempt) if choice.batch else paths.rank_log(attempt, (*choice.ranks, 0)[0])


def batch_log(paths: RunPaths, attempt: str) -> Path:
    """Return the path of the batch script's log."""
    return paths.logs / attempt / "batch.log"


def files_to_show(paths: RunPaths, attempt: str | None, choice: Choice) -> list[Path]:
    """Return the files to print, those of ranks in the order of their numbers."""
    if attempt is None:
        return []
    if choice.all_ranks:
        logs = (paths.logs / attempt).glob("rank-*.log")
        return sorted(logs, key=lambda file: (len(file.name), file.name))
    if len(choice.ranks) > 1:
        return [paths.rank_log(attempt, rank) for rank in choice.ranks]
    return [main_file(paths, attempt, choice)]


def files_to_follow(paths: RunPaths, attempt: str | None, choice: Choice) -> list[Path]:
    """Return the files to print as they grow: by default batch script and rank 0, which write one after the other."""
    if attempt is None or choice.batch or choice.ranks or choice.all_ranks:
        return files_to_show(paths, attempt, choice)
    return [batch_log(paths, attempt), paths.rank_log(attempt, 0)]
