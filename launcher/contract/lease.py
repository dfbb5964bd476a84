"""The lease of a run directory: one attempt writes there, and everybody can see which.

`lease.json` names the owner; it is created exclusively, so that of two attempts one gets it, and its modification time
is renewed while the owner lives. Whoever finds it taken refuses, unless the owner is known to be gone: the same job
was started again, its job is over, its process is gone, or nobody has renewed it for a long time. An owner that was
taken for dead (a suspended job, a machine that hung) finds another's name in the file and stops without writing.

Times are those of the file system that holds the run, on all sides: clocks of nodes differ.

Rejected: flock and fcntl locks, which many shared file systems keep per node, or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.contract import processes
from launcher.contract.errors import RunStateError
from launcher.contract.job_state import JobState, from_slurm
from launcher.contract.rundir import RunPaths, write_atomic

RENEW_SECONDS = 60.0
"""Between renewals: a file system does not notice one such request a minute."""
EXPIRY_SECONDS = 600.0
"""Without a renewal for this long the owner counts as gone, if no scheduler knows better. Longer than it takes to pull
a container image, since nobody renews between the steps of a batch script."""

_POLL_SECONDS = 0.05

BY_HAND = "by-hand"
"""Attempt of ranks that no batch script started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who holds a run."""

    attempt: str
    job_id: str = ""
    host: str = ""
    pid: int = 0
    """Of the batch script, or of rank 0 where there is none."""
    process_start: int | None = None
    """With the id it names one process for good."""

    @classmethod
    def of_process(cls, attempt: str, job_id: str = "", pid: int | None = None) -> Owner:
        """The owner that lives as long as a process of this machine does."""
        number = os.getpid() if pid is None else pid
        start = processes.start_ticks(number)
        return cls(attempt=attempt, job_id=job_id, host=socket.gethostname(), pid=number, process_start=start)

    @property
    def restart(self) -> int | None:
        """How often Slurm had started the job before; None where Slurm did not."""
        job, _, count = self.attempt.rpartition(".")
        return int(count) if job == self.job_id and count.isdigit() else None

    def is_same(self, other: Owner) -> bool:
        """One attempt, whichever of its processes asks."""
        if self.attempt != other.attempt:
            return False
        return self.attempt != BY_HAND or (self.host, self.pid) == (other.host, other.pid)

    def describe(self) -> str:
        """For messages."""
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"attempt {self.attempt}{job} on {self.host}, process {self.pid}"


def holder(paths: RunPaths) -> Owner | None:
    """Who holds the run; an owner without a name where the file was never filled."""
    return _read(paths.lease)


def take(paths: RunPaths, owner: Owner, holder_state: str = "") -> str | None:
    """Hold the run as `owner`; why an earlier owner's lease was void, or None where there was none.

    `holder_state` is Slurm's word for the holder's job, or empty where it cannot tell. RunStateError where the run
    is held.
    """
    while not _create(paths, owner):
        current = holder(paths)
        if current is None:
            continue
        if current.is_same(owner):
            os.utime(paths.lease)
            return None
        reason = why_void(current, owner, _age(paths), holder_state)
        if reason is None:
            raise _is_held(paths, current)
        if _take_over(paths, owner, current, holder_state):
            return f"{current.describe()}: {reason}"
        time.sleep(_POLL_SECONDS)
    return None


def check_free(paths: RunPaths, holder_state: str = "") -> None:
    """RunStateError where somebody holds the run; `holder_state` as for `take`."""
    current = holder(paths)
    if current is not None and why_void(current, Owner.of_process("launcher"), _age(paths), holder_state) is None:
        raise _is_held(paths, current)


def release(paths: RunPaths, owner: Owner) -> None:
    """Let go of the run, if it is still held by `owner`."""
    current = holder(paths)
    if current is not None and current.is_same(owner):
        paths.lease.unlink(missing_ok=True)


def renew(paths: RunPaths, owner: Owner) -> bool:
    """Show that the owner lives; False when the run is no longer its own."""
    current = holder(paths)
    if current is None or not current.is_same(owner):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(paths.lease)
    return True


def why_void(current: Owner, claimant: Owner, age: float, state: str = "") -> str | None:
    """Why the lease of `current` no longer counts, or None while it does."""
    before, now = current.restart, claimant.restart
    if current.job_id == claimant.job_id and before is not None and now is not None and now > before:
        return "Slurm has started its job again"
    known = from_slurm(state) if state else JobState.UNKNOWN
    if known.terminal:
        return f"its job is {known.value}"
    if known.active:
        return None
    here = current.host == claimant.host and before is None
    if here and current.pid and processes.start_ticks(current.pid) != current.process_start:
        return "its process is gone"
    return f"not renewed for {age:.0f} s" if age > EXPIRY_SECONDS else None


class Keeper:
    """Renews the lease in a thread, and notices when it is another's."""

    def __init__(self, paths: RunPaths, owner: Owner) -> None:
        self._paths = paths
        self._owner = owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self.lost = False
        """Another attempt holds the run: nothing may be written to it any more."""

    def start(self) -> None:
        """Begin renewing."""
        self._thread.start()

    def stop(self) -> None:
        """End renewing; the lease stays."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Renew now."""
        with contextlib.suppress(OSError):  # a file system that is away for a while takes no lease from anybody
            self.lost = self.lost or not renew(self._paths, self._owner)

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self.check()


@contextlib.contextmanager
def held(paths: RunPaths, attempt: str) -> Iterator[Keeper]:
    """Keep the lease of `attempt` for as long as the body runs; take it first where no batch script has."""
    owner = Owner.of_process(attempt)
    before = holder(paths)
    mine = before is not None and before.is_same(owner)
    if not mine:
        take(paths, owner)
    keeper = Keeper(paths, owner)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.stop()
        if not mine:
            release(paths, owner)


def _is_held(paths: RunPaths, current: Owner) -> RunStateError:
    return RunStateError(
        f"run {paths.name} is held by {current.describe()}, renewed {_age(paths):.0f} s ago; two attempts must not "
        f"write one run. Wait for it or end it; a lease of a dead owner is void after {EXPIRY_SECONDS:.0f} s"
    )


def _read(file: Path) -> Owner | None:
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Owner(**values)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return Owner(attempt="unknown")


def _create(paths: RunPaths, owner: Owner) -> bool:
    """Write the lease, if nobody has."""
    try:
        handle = os.open(paths.lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_text(owner))
    return True


def _take_over(paths: RunPaths, owner: Owner, judged: Owner, state: str) -> bool:
    """Replace a void lease; False where another claimant is at it, or was faster.

    Claimants take turns by a second file, so that nobody replaces the fresh lease of one who has just replaced it.
    """
    turn = paths.lease.with_name(".lease-turn")
    try:
        os.close(os.open(turn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        if _age(paths, turn) > EXPIRY_SECONDS:  # of a claimant that died
            turn.unlink(missing_ok=True)
        return False
    try:
        if holder(paths) != judged or why_void(judged, owner, _age(paths), state) is None:
            return False
        write_atomic(paths.lease, _text(owner))
        return True
    finally:
        turn.unlink(missing_ok=True)


def _text(owner: Owner) -> str:
    return json.dumps(dataclasses.asdict(owner)) + "\n"


def _age(paths: RunPaths, file: Path | None = None) -> float:
    """Seconds since the last renewal (or of another file), by the file system's own clock."""
    with tempfile.NamedTemporaryFile(prefix=".now-", dir=paths.root) as now:
        try:
            return max(0.0, os.fstat(now.fileno()).st_mtime - (file or paths.lease).stat().st_mtime)
        except FileNotFoundError:
            return 0.0
