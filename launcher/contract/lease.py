"""The lease of a run directory: a single attempt may write there, and everybody can see which.

`lease.json` names the owner. It is created exclusively, so that only one of two attempts gets it, and its modification
time is renewed while the owner lives. An attempt that finds it taken refuses to run, unless the owner is known to be
gone: its job was started again or is over, its process is gone, or the lease was not renewed for a long time. An owner
that was wrongly taken for dead (a suspended job, a machine that hung) finds another name in the file and stops without
writing.

All times are those of the file system that holds the run, since the clocks of nodes differ.

Rejected: flock and fcntl locks, which many shared file systems keep per node, or not at all.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.contract import processes
from launcher.contract.errors import RunStateError
from launcher.contract.job import AttemptName
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths, write_atomic

RENEW_SECONDS = 60.0
"""Time between renewals; one such request a minute is no load for a file system."""
EXPIRY_SECONDS = 600.0
"""An owner that has not renewed its lease for this long counts as gone, unless its scheduler knows better. Longer than
the pull of a container image, since nobody renews the lease between the steps of a batch script."""

_POLL_SECONDS = 0.05

BY_HAND = "by-hand"
"""Name of the attempt of ranks that no batch script started."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Owner:
    """Who holds a run."""

    attempt: str
    job_id: str = ""
    cluster: str = ""
    """The Slurm cluster whose id it is, as the batch script knows it."""
    host: str = ""
    pid: int = 0
    """Process of the batch script, or of rank 0 where there is none."""
    process_start: int | None = None
    """Its start time in clock ticks since boot: process ids are reused, the pair is not."""

    @classmethod
    def of_process(cls, attempt: str, job_id: str = "", pid: int | None = None, cluster: str = "") -> Owner:
        """Return the owner for a process of this machine, by default this one."""
        number = os.getpid() if pid is None else pid
        start = processes.start_ticks(number)
        host = socket.gethostname()
        return cls(attempt=attempt, job_id=job_id, cluster=cluster, host=host, pid=number, process_start=start)

    @property
    def start(self) -> tuple[int, int] | None:
        """How often the job, and in it its ranks, had been started. None where no scheduler starts jobs again."""
        name = AttemptName(self.attempt)
        return None if name.restart is None or name.job != self.job_id else (name.restart, name.generation)

    def is_same(self, other: Owner) -> bool:
        """Return whether both are processes of one attempt."""
        if self.attempt != other.attempt:
            return False
        return self.attempt != BY_HAND or (self.host, self.pid) == (other.host, other.pid)

    def is_of_job(self, text: str, cluster: str) -> bool:
        """Return whether its job is the one with this id. A cluster that is not known may be any."""
        return self.job_id == text and (not cluster or not self.cluster or self.cluster == cluster)

    def describe(self) -> str:
        """Return a phrase for messages."""
        job = f" (job {self.job_id})" if self.job_id else ""
        return f"attempt {self.attempt}{job} on {self.host}, process {self.pid}"


def holder(paths: RunPaths) -> Owner | None:
    """Return who holds the run, or None. The attempt is `unknown` where the file was never filled."""
    return _read(paths.lease)


def take(paths: RunPaths, owner: Owner, holder_state: JobState = JobState.UNKNOWN) -> str | None:
    """Take the lease for `owner` and return why an earlier owner's lease was void, or None where there was none.

    `holder_state` is the state of the holder's job as its scheduler tells it. RunStateError where the run is held.
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


def check_free(paths: RunPaths, holder_state: JobState = JobState.UNKNOWN) -> None:
    """Raise RunStateError where somebody holds the run. `holder_state` is as for `take`."""
    current = holder(paths)
    if current is not None and why_void(current, Owner.of_process("launcher"), _age(paths), holder_state) is None:
        raise _is_held(paths, current)


def release(paths: RunPaths, owner: Owner) -> None:
    """Release the lease if `owner` still holds it."""
    current = holder(paths)
    if current is not None and current.is_same(owner):
        paths.lease.unlink(missing_ok=True)


def renew(paths: RunPaths, owner: Owner) -> bool:
    """Renew the lease and return True, or return False if the run is no longer held by `owner`."""
    current = holder(paths)
    if current is None or not current.is_same(owner):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.utime(paths.lease)
    return True


def why_void(current: Owner, claimant: Owner, age: float, state: JobState = JobState.UNKNOWN) -> str | None:
    """Return why the lease of `current` no longer counts, or None while it does.

    `age` is the time since its last renewal in seconds, `state` that of its job.
    """
    before, now = current.start, claimant.start
    same_job = current.is_of_job(claimant.job_id, claimant.cluster)
    if same_job and before is not None and now is not None and now > before:
        return "its job was started again"
    if state.terminal:
        return f"its job is {state.value}"
    if state.active:
        return None
    here = current.host == claimant.host and before is None
    if here and current.pid and processes.start_ticks(current.pid) != current.process_start:
        return "its process is gone"
    return f"not renewed for {age:.0f} s" if age > EXPIRY_SECONDS else None


class Keeper:
    """Renews the lease in a thread, and notices when another attempt has taken it."""

    def __init__(self, paths: RunPaths, owner: Owner) -> None:
        self._paths = paths
        self._owner = owner
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)
        self._looked = -math.inf
        """When `confirm` last looked at the file."""
        self.lost = False
        """Another attempt holds the run, so this one may no longer write to it."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop renewing and keep the lease."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def check(self) -> None:
        """Renew once, now."""
        with contextlib.suppress(OSError):  # a file system that is away for a while does not end the lease
            self.lost = self.lost or not renew(self._paths, self._owner)

    def confirm(self, max_age: float = 0.0) -> None:
        """Raise RunStateError if another attempt holds the run. A look that is at most `max_age` seconds old counts."""
        if time.monotonic() - self._looked > max_age:
            self._looked = time.monotonic()
            with contextlib.suppress(OSError):  # if the file system is away, what is to be written fails by itself
                current = holder(self._paths)
                self.lost = self.lost or current is None or not current.is_same(self._owner)
        if self.lost:
            raise RunStateError(
                f"another attempt has taken over run {self._paths.name}; {self._owner.attempt} writes no more"
            )

    def _keep(self) -> None:
        while not self._ended.wait(RENEW_SECONDS):
            self.check()


@contextlib.contextmanager
def held(paths: RunPaths, attempt: str) -> Iterator[Keeper]:
    """Renew the lease of `attempt` while the body runs. Take and release it where no batch script holds it."""
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
        f"write to one run. Wait for it or end it; the lease of a dead owner expires after {EXPIRY_SECONDS:.0f} s"
    )


def _read(file: Path) -> Owner | None:
    try:
        owner = Owner(**json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        return Owner(attempt="unknown")
    texts = (owner.attempt, owner.job_id, owner.host)
    start_is_known = owner.process_start is None or type(owner.process_start) is int
    is_whole = all(isinstance(text, str) for text in texts) and type(owner.pid) is int and start_is_known
    return owner if is_whole else Owner(attempt="unknown")


def _create(paths: RunPaths, owner: Owner) -> bool:
    """Create the lease and return True, or return False where it exists."""
    try:
        handle = os.open(paths.lease, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(_text(owner))
    return True


def _take_over(paths: RunPaths, owner: Owner, judged: Owner, state: JobState) -> bool:
    """Replace the void lease of `judged` and return True, or False where another claimant did or is doing so."""
    # Claimants exclude each other by a second file, or one could replace the lease that another has just written.
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
    """Return the age of the lease (or of `file`) in seconds, by the clock of the file system."""
    with tempfile.NamedTemporaryFile(prefix=".now-", dir=paths.root) as now:
        try:
            return max(0.0, os.fstat(now.fileno()).st_mtime - (file or paths.lease).stat().st_mtime)
        except FileNotFoundError:
            return 0.0
