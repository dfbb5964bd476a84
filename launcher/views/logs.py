"""`launcher logs`: print the logs of an attempt, or follow them until it has ended."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import RunStateError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.first_failure import first_error, first_failure, last_lines, last_words
from launcher.runs.snapshot import snapshot
from launcher.runs.state import RunStatus, collect
from launcher.views.log_files import Choice, batch_log, chosen_attempt, files_to_follow, files_to_show, main_file

_POLL_SECONDS = 0.3
_ASK_SECONDS = 10.0  # between questions to the scheduler while following


@dataclass(frozen=True, kw_only=True, slots=True)
class LogText:
    """What `logs --json` prints."""

    run: str
    """The run's name."""
    attempt: str | None
    """The attempt; null where none has started yet."""
    files: tuple[str, ...]
    """The log files that were asked for, as far as they exist."""
    text: str
    """Their last lines, or the last words of the rank that failed first."""
    note: str
    """Why a log is missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logs:
    """The logs of an attempt: where they are, or the last words of the rank that failed first."""

    run: str
    """The run's name."""
    attempt: str | None
    """The attempt; null where none has started yet."""
    files: tuple[str, ...] = ()
    """The log files that were asked for, as far as they exist."""
    words: str = ""
    """The last words of the rank that failed first, where those were asked for."""
    note: str = ""
    """Why a log is missing."""

    def tail(self, lines: int) -> str:
        """Return the last lines of each file, under its name where there are several, or the last words."""
        if self.words or len(self.files) == 1:
            return self.words or last_lines(Path(self.files[0]), lines)
        return "\n".join(f"==> {Path(file).name}\n{last_lines(Path(file), lines)}" for file in self.files)

    def text(self, lines: int) -> LogText:
        """Return what programs are told."""
        return LogText(run=self.run, attempt=self.attempt, files=self.files, text=self.tail(lines), note=self.note)


def choose(paths: RunPaths, choice: Choice) -> Logs:
    """Return the logs that are meant. Raise RunStateError where there is no such attempt, or no failure is known."""
    attempt = chosen_attempt(paths, choice.attempt)
    if choice.failed:
        return Logs(run=paths.name, attempt=attempt, words=_first_failure(paths, attempt))
    files, note = [file for file in files_to_show(paths, attempt, choice) if file.exists()], ""
    if not files:
        note = _awaited(paths, None if attempt is None else main_file(paths, attempt, choice))
        if attempt is not None and not choice.ranks and not choice.all_ranks:
            files = [file for file in [batch_log(paths, attempt)] if file.exists()]
    return Logs(run=paths.name, attempt=attempt, files=tuple(map(str, files)), note=note)


def show(logs: Logs, lines: int | None = None) -> None:
    """Print logs as they are now, of each file the last lines where a number is given."""
    if logs.note:
        print(f"# {logs.note}", file=sys.stderr)
    if logs.words:
        print(logs.words)
    for file in map(Path, logs.files):
        _Follower(file, prefixed=len(logs.files) > 1, lines=lines).copy(last=True)


def follow(paths: RunPaths, choice: Choice, lines: int | None = None) -> RunStatus:
    """Print logs as they grow, then what the rank that failed first said. Return the status at the attempt's end.

    `lines` is how many lines of each log that is there already are printed; None prints all.
    """
    followers: dict[Path, _Follower] = {}
    told, asked = "", 0.0
    before = None
    while True:
        attempt = chosen_attempt(paths, choice.attempt)
        if attempt != before:  # the last lines of the attempt before may have come between two looks
            for follower in followers.values():
                follower.copy(last=True)
            before = attempt
        over = _ended(paths, attempt)  # asked before reading, so that all that was written until then is shown
        if not over and time.monotonic() - asked >= _ASK_SECONDS:
            status, asked = _status(paths), time.monotonic()
            over = not status.state.active and status.state is not JobState.UNKNOWN
            if attempt is None and status.state is not JobState.RUNNING and (line := _line(status)) != told:
                print(f"# {line}", file=sys.stderr, flush=True)
                told = line
        for file in files_to_follow(paths, attempt, choice):
            if file not in followers:
                followers[file] = _Follower(file, prefixed=choice.several, lines=lines)
            followers[file].copy(last=over)
        lines = None  # files that come later are shown from their first line on
        if over:
            if attempt is not None and not choice.batch:
                _explain(paths, attempt, followers)
            return _status(paths)
        time.sleep(_POLL_SECONDS)


class _Follower:
    """Prints what a file gains: with a prefix only whole lines, so that lines of several files do not mix."""

    def __init__(self, file: Path, *, prefixed: bool, lines: int | None) -> None:
        self._file = file
        self._prefix = f"[{file.stem.replace('-', ' ')}] " if prefixed else ""
        self._offset = 0 if lines is None else _begin_of_last(file, lines)

    def copy(self, *, last: bool) -> None:
        """Print what is new. `last` says that nothing more will come, so an unfinished line is printed too."""
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


def _begin_of_last(file: Path, lines: int) -> int:
    """Return the offset at which the last lines of a file begin, 0 where it is not there yet."""
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        return 0
    return len(text) - sum(map(len, text.splitlines(keepends=True)[-lines:]))


def _ended(paths: RunPaths, attempt: str | None) -> bool:
    run = snapshot(paths)
    return attempt is not None and (run.attempt != attempt or run.exit_code is not None)


def _status(paths: RunPaths) -> RunStatus:
    return collect([paths])[0][0]


def _line(status: RunStatus) -> str:
    reason = f" ({status.reason})" if status.reason else ""
    return f"run {status.run}: job {status.job_id or status.job} is {status.state.value}{reason}"


def _explain(paths: RunPaths, attempt: str, shown: dict[Path, _Follower]) -> None:
    """Print the last words of the rank that failed first, unless its log was shown anyway."""
    failure = first_failure(paths, attempt)
    if failure is not None and paths.rank_log(attempt, failure.rank) not in shown:
        print(_first_failure(paths, attempt), flush=True)


def _first_failure(paths: RunPaths, attempt: str | None) -> str:
    """Return which rank failed first and its last words, or raise RunStateError if none is known."""
    failure = first_failure(paths, attempt) if attempt is not None else None
    error = first_error(paths, attempt) if attempt is not None else None
    if attempt is not None and failure is not None:
        words = last_words(paths.rank_log(attempt, failure.rank))
        return f"# {failure} failed first, with exit code {failure.exit_code}:\n{words}"
    if error is not None:  # of a single process, as prepare is one
        return f"# {error.kinds[0]} on {error.host}:\n{error.message}"
    newest = snapshot(paths)
    if newest.detail and attempt == newest.attempt:
        return f"# {newest.detail}"
    raise RunStateError(
        f"no rank of run {paths.name}{f', attempt {attempt},' if attempt else ''} is known to have failed; "
        f"`launcher logs {paths.name} --batch` shows how the attempt went"
    )


def _awaited(paths: RunPaths, file: Path | None) -> str:
    """Return why a log is missing."""
    status = _status(paths)
    what = file.name if file is not None else "log"
    return f"no {what}{'' if status.state.terminal else ' yet'}; {_line(status)}"
