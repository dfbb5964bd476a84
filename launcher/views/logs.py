"""Print or follow the logs of an attempt.

`batch.log` holds what one process did (prepare, export) and how the ranks ended; `rank-<N>.log` what rank N printed.
Following without a choice shows both as they grow: they take turns. Several ranks are told apart by a prefix.
"""

from __future__ import annotations

import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError, did_you_mean
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.find import snapshot
from launcher.runs.first_failure import first_failure, last_words
from launcher.runs.state import RunStatus, collect

_POLL_SECONDS = 0.3
_ASK_SECONDS = 10.0  # between questions to the scheduler while following


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """Whose logs."""

    ranks: tuple[int, ...] = ()
    all_ranks: bool = False
    batch: bool = False
    failed: bool = False
    """The last words of the first rank that failed."""
    attempt: str | None = None
    """None: the newest."""


def parse_ranks(text: str) -> tuple[int, ...]:
    """`0,3-5` → 0, 3, 4, 5."""
    ranks: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ConfigError(f"--rank {text}: {part!r} is no rank; write numbers and ranges, e.g. 0,3-5")
        ranks += range(int(match[1]), int(match[2] or match[1]) + 1)
    return tuple(dict.fromkeys(ranks))


def show(paths: RunPaths, choice: Choice) -> None:
    """Print logs as they are now."""
    label = _attempt(paths, choice.attempt)
    if choice.failed:
        print(_failed_words(paths, label))
        return
    files = [file for file in _chosen(paths, label, choice) if file.exists()]
    if not files:
        asked = choice.ranks or choice.all_ranks or label is None
        print(f"# {_awaited(paths, None if label is None else _default(paths, label, choice))}", file=sys.stderr)
        files = [] if asked else [paths.logs / str(label) / "batch.log"]
    many = len(files) > 1
    for file in files:
        _Follower(file, prefixed=many).copy(last=True)


def follow(paths: RunPaths, choice: Choice) -> RunStatus:
    """Print logs as they grow until the attempt has ended, and what the first rank to fail said; its last state."""
    followers: dict[Path, _Follower] = {}
    told, asked = "", 0.0
    before = None
    while True:
        label = _attempt(paths, choice.attempt)
        if label != before:  # the last words of an attempt may come between two looks
            for follower in followers.values():
                follower.copy(last=True)
            before = label
        over = _ended(paths, label)  # asked before reading: what was written until then is shown
        if not over and time.monotonic() - asked >= _ASK_SECONDS:
            status, asked = _status(paths), time.monotonic()
            over = not status.state.active and status.state is not JobState.UNKNOWN
            if label is None and status.state is not JobState.RUNNING and (line := _line(status)) != told:
                print(f"# {line}", file=sys.stderr, flush=True)
                told = line
        several = len(choice.ranks) > 1 or choice.all_ranks
        for file in _followed(paths, label, choice):
            followers.setdefault(file, _Follower(file, prefixed=several)).copy(last=over)
        if over:
            if label is not None and not choice.batch:
                _explain(paths, label, followers)
            return _status(paths)
        time.sleep(_POLL_SECONDS)


class _Follower:
    """Prints what a file gains; with a prefix whole lines only, so that those of others do not cut into them."""

    def __init__(self, file: Path, *, prefixed: bool) -> None:
        self._file = file
        self._prefix = f"[{file.stem.replace('-', ' ')}] " if prefixed else ""
        self._offset = 0

    def copy(self, *, last: bool) -> None:
        """Print what is new; `last`: nothing more will come."""
        try:
            with self._file.open("rb") as log:
                log.seek(self._offset)
                new = log.read()
        except FileNotFoundError:
            return
        if self._prefix and not last:
            new = new[: new.rfind(b"\n") + 1]
        self._offset += len(new)
        if new:
            text = new.decode("utf-8", errors="replace")
            if self._prefix:
                text = "".join(f"{self._prefix}{line}\n" for line in text.splitlines())
            sys.stdout.write(text)
            sys.stdout.flush()


def _attempt(paths: RunPaths, wanted: str | None) -> str | None:
    """The attempt asked for, or the newest that has started."""
    if wanted is None:
        return snapshot(paths).attempt
    known = [path.name for path in paths.logs.iterdir() if path.is_dir()] if paths.logs.is_dir() else []
    if wanted not in known:
        near = did_you_mean(wanted, known)
        raise RunStateError(f"run {paths.name} has no attempt {wanted!r}{near}; it has {', '.join(known) or 'none'}")
    return wanted


def _ended(paths: RunPaths, label: str | None) -> bool:
    item = snapshot(paths)
    return label is not None and (item.attempt != label or item.exit_code is not None)


def _status(paths: RunPaths) -> RunStatus:
    return collect([paths])[0][0]


def _line(status: RunStatus) -> str:
    reason = f" ({status.reason})" if status.reason else ""
    return f"run {status.run}: job {status.job} is {status.state.value}{reason}"


def _default(paths: RunPaths, label: str, choice: Choice) -> Path:
    return paths.logs / label / "batch.log" if choice.batch else paths.rank_log(label, (*choice.ranks, 0)[0])


def _chosen(paths: RunPaths, label: str | None, choice: Choice) -> list[Path]:
    """The files to show, of ranks in order of their numbers."""
    if label is None:
        return []
    if choice.all_ranks:
        logs = (paths.logs / label).glob("rank-*.log")
        return sorted(logs, key=lambda file: (len(file.name), file.name))
    if len(choice.ranks) > 1:
        return [paths.rank_log(label, rank) for rank in choice.ranks]
    return [_default(paths, label, choice)]


def _followed(paths: RunPaths, label: str | None, choice: Choice) -> list[Path]:
    if label is None:
        return []
    if choice.batch or choice.ranks or choice.all_ranks:
        return _chosen(paths, label, choice)
    return [paths.logs / label / "batch.log", paths.rank_log(label, 0)]


def _explain(paths: RunPaths, label: str, shown: dict[Path, _Follower]) -> None:
    """At the end of a failed attempt: the words of the rank that failed first, if they were not among those shown."""
    failure = first_failure(paths, label)
    if failure is not None and paths.rank_log(label, failure.rank) not in shown:
        print(_failed_words(paths, label), flush=True)


def _failed_words(paths: RunPaths, label: str | None) -> str:
    failure = first_failure(paths, label) if label is not None else None
    if label is None or failure is None:
        raise RunStateError(
            f"no rank of run {paths.name}{f', attempt {label},' if label else ''} is known to have failed; "
            f"`launcher logs {paths.name} --batch` shows how the attempt went"
        )
    words = last_words(paths.rank_log(label, failure.rank))
    return f"# {failure} failed first, with exit code {failure.exit_code}:\n{words}"


def _awaited(paths: RunPaths, file: Path | None) -> str:
    """What a missing log waits for."""
    status = _status(paths)
    missing = f"no {file.name} yet; " if file is not None else "no log yet; "
    return f"{missing if not status.state.terminal else ''}{_line(status)}"
