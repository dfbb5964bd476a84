"""What is about to be submitted, written down before it is: after a kill the job is found again.

Each submission has a random token. It is on disk before sbatch is called and travels with the job (`--comment`, which
is also part of the command line that accounting keeps; a local run has it in its environment). A submission that was
begun and not recorded is looked for by its token: in the run's own events, in the queue, in the accounts. Only when
all of them have answered, no sbatch that might still be at work is left, and the controller has had time to take in
what it was sent, is the job said not to exist.
"""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract import processes
from launcher.contract.errors import RunStateError
from launcher.contract.manifest import Attempt, read_manifest
from launcher.contract.rundir import RunPaths, read_json, read_lines, write_json
from launcher.scheduler import slurm

TOKEN_VARIABLE = "SFT_SUBMISSION"
"""Environment variable in which a local run carries its token."""

SBATCH_TIMEOUT = 60
"""Seconds for sbatch to answer; a loaded controller takes some."""

SETTLE_SECONDS = 10.0
"""How long the controller may take to show a job whose sbatch has ended: its own message timeout, if unset."""

_CLOCK_SKEW = 60.0  # between login and compute nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """One submission that was begun."""

    token: str
    scheduler: str
    written_at: float
    host: str

    @property
    def settled_by(self) -> float:
        """When its sbatch has been ended, whatever happened, and the controller has heard the last of it."""
        return self.written_at + SBATCH_TIMEOUT + 10 + SETTLE_SECONDS


def begin(paths: RunPaths, scheduler: str) -> Intent:
    """Write down, durably, that a job is about to be submitted."""
    intent = Intent(
        token=f"sft-{secrets.token_hex(16)}", scheduler=scheduler, written_at=time.time(), host=socket.gethostname()
    )
    write_json(paths.submission, dataclasses.asdict(intent))
    return intent


def pending(paths: RunPaths) -> Intent | None:
    """The submission that was begun and is not known to have ended."""
    try:
        values = read_json(paths.submission)
        return None if values is None else Intent(**values)
    except (ValueError, TypeError) as error:
        raise RunStateError(f"{paths.submission} cannot be read: {error}") from None


def end(paths: RunPaths) -> None:
    """The submission is recorded, or is known to have failed."""
    with contextlib.suppress(FileNotFoundError):
        paths.submission.unlink()


def free_name(paths: RunPaths) -> str:
    """The next name after this run's that no run has, or that has a run whose submission was begun and not finished."""
    stem, dash, number = paths.name.rpartition("-")
    base, first = (stem, int(number) + 1) if dash and number.isdigit() else (paths.name, 2)
    while _is_taken(RunPaths(paths.root.parent / f"{base}-{first}")):
        first += 1
    return f"{base}-{first}"


def _is_taken(paths: RunPaths) -> bool:
    if not paths.root.exists() or paths.submission.exists():
        return False
    return not paths.manifest.is_file() or bool(read_manifest(paths).attempts)


def find(paths: RunPaths, name: str, attempts: Sequence[Attempt], intent: Intent) -> Attempt | None:
    """The job, named `name`, of a submission; None when it is certain that there is none and will be none.

    `attempts` are the jobs that are recorded.

    Waits while that is not certain. SchedulerError where the scheduler does not answer.
    """
    recorded = next((attempt for attempt in attempts if attempt.token == intent.token), None)
    if recorded is not None:
        return recorded
    if intent.scheduler == "local":
        return _find_local(paths, attempts, intent)
    quiet_since: float | None = None
    while True:
        now = time.time()
        if quiet_since is None and not _may_be_at_work(intent, now):
            quiet_since = now
        certain = quiet_since is not None and (now >= quiet_since + SETTLE_SECONDS or now >= intent.settled_by)
        job_id = _started(paths, attempts, intent) or slurm.find_job(name, intent.token, intent.written_at)
        if job_id is not None:
            return Attempt(
                job_id=job_id, scheduler="slurm", submitted_at=intent.written_at, host=intent.host, token=intent.token
            )
        if certain:
            return None
        time.sleep(min(1.0, SETTLE_SECONDS))


def _may_be_at_work(intent: Intent, now: float) -> bool:
    """Whether the sbatch of this submission may still run; from another machine only time can tell."""
    if now >= intent.settled_by:
        return False
    return intent.host != socket.gethostname() or bool(processes.with_text(intent.token))


def _find_local(paths: RunPaths, attempts: Sequence[Attempt], intent: Intent) -> Attempt | None:
    if intent.host != socket.gethostname():
        raise RunStateError(f"run {paths.name} was being started on {intent.host}; run this there")
    found = [pid for pid in processes.with_text(intent.token) if processes.is_session_leader(pid)]
    started = _started(paths, attempts, intent)
    if not found and started is None:
        return None
    pid = min(found, key=lambda pid: processes.start_ticks(pid) or 0) if found else int(started or 0)
    return Attempt(
        job_id=str(pid),
        scheduler="local",
        submitted_at=intent.written_at,
        host=intent.host,
        process_start=processes.start_ticks(pid) if found else None,
        token=intent.token,
    )


def _started(paths: RunPaths, attempts: Sequence[Attempt], intent: Intent) -> str | None:
    """A job that has begun says so itself, and nobody else has begun one since the intent."""
    known = {attempt.job_id for attempt in attempts}
    for event in read_lines(paths.events):
        late_enough = float(event.get("time", 0)) >= intent.written_at - _CLOCK_SKEW
        if event.get("event") == "attempt_started" and late_enough and str(event.get("job_id")) not in known:
            return str(event["job_id"])
    return None
