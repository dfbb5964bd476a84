"""Print or follow the logs of an attempt.

`batch.log` holds what one process did (prepare, export) and how the ranks ended; `rank-<N>.log` what rank N printed.
Following without a choice shows both as they grow: they take turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launcher.errors import RunStateError, did_you_mean
from launcher.rundir import RunPaths
from launcher.runs import snapshot
from launcher.state import JobState
from launcher.status import RunStatus, collect

_POLL_SECONDS = 0.3
_ASK_SECONDS = 10.0  # between questions to the scheduler while following


def show(paths: RunPaths, *, rank: int | None, attempt: str | None, batch: bool) -> None:
    """Print a log as it is now."""
    label = _attempt(paths, attempt)
    file = _log(paths, label, rank, batch) if label else None
    if file is None or not file.exists():
        chosen = None if label is None else paths.logs / label / "batch.log"
        print(f"# {_awaited(paths, file)}", file=sys.stderr)
        if rank is not None or chosen is None or not chosen.exists():
            return
        file = chosen
    sys.stdout.write(file.read_text(encoding="utf-8", errors="replace"))
    sys.stdout.flush()


def follow(paths: RunPaths, *, rank: int | None, attempt: str | None, batch: bool) -> RunStatus:
    """Print logs as they grow until the attempt has ended; its last state."""
    offsets: dict[Path, int] = {}
    told, asked = "", 0.0
    status: RunStatus | None = None
    while True:
        label = _attempt(paths, attempt)
        over = _ended(paths, label)  # asked before reading: what was written until then is shown
        if not over and time.monotonic() - asked >= _ASK_SECONDS:
            status, asked = _status(paths), time.monotonic()
            over = not status.state.active and status.state is not JobState.UNKNOWN
            if label is None and status.state is not JobState.RUNNING and (line := _line(status)) != told:
                print(f"# {line}", file=sys.stderr, flush=True)
                told = line
        for file in _followed(paths, label, rank, batch):
            offsets[file] = _copy(file, offsets.get(file, 0))
        if over:
            return _status(paths)
        time.sleep(_POLL_SECONDS)


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


def _log(paths: RunPaths, label: str, rank: int | None, batch: bool) -> Path:
    return paths.logs / label / "batch.log" if batch else paths.rank_log(label, rank or 0)


def _followed(paths: RunPaths, label: str | None, rank: int | None, batch: bool) -> Sequence[Path]:
    if label is None:
        return ()
    if batch or rank is not None:
        return (_log(paths, label, rank, batch),)
    return (_log(paths, label, 0, True), _log(paths, label, 0, False))


def _copy(file: Path, offset: int) -> int:
    """Print what `file` holds beyond `offset`; the new offset."""
    try:
        with file.open("rb") as log:
            log.seek(offset)
            new = log.read()
    except FileNotFoundError:
        return offset
    if new:
        sys.stdout.write(new.decode("utf-8", errors="replace"))
        sys.stdout.flush()
    return offset + len(new)


def _awaited(paths: RunPaths, file: Path | None) -> str:
    """What a missing log waits for."""
    status = _status(paths)
    missing = f"no {file.name} yet; " if file is not None else "no log yet; "
    return f"{missing if not status.state.terminal else ''}{_line(status)}"
