"""Why an attempt ended, from what it left behind: exit code, events, the scheduler's view of the job, error, log tails.

Pure: `launcher.attempts.evidence` gathers the evidence. What is certain comes first (a person's cancel, the scheduler's
own words, exit codes that say what happened), then the error that the first failing rank recorded, then the end of its
log. Errors of other ranks do not count: those ranks fail because the first one did, mostly with a broken connection.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from launcher.contract.exit_codes import ExitCode
from launcher.contract.job_state import JobState
from launcher.contract.rank_error import RankError
from launcher.scheduler.base import JobView


class Cause(StrEnum):
    """Why an attempt ended."""

    DONE = "done"
    PREEMPTED = "preempted"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    NODE_FAILURE = "node_failure"
    OUT_OF_MEMORY = "out_of_memory"
    COMMUNICATION = "communication"
    """NCCL, gloo or the rendezvous."""
    HANG = "hang"
    BAD_NODE = "bad_node"
    USER_CODE = "user_code"
    """An error in Python code, of ours or the user's; or numbers that went wrong."""
    DATA = "data"
    CONFIG = "config"
    DISK_FULL = "disk_full"
    UNKNOWN = "unknown"


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known of the end of an attempt."""

    exit_code: int
    restart: int = 0
    """How often the scheduler had started the job before this attempt."""
    requeues: bool = True
    """The scheduler stops jobs to start them again later; otherwise a signal to stop comes from a person."""
    cancelled: bool = False
    """`launcher cancel` was called for its job."""
    stop_signal: str = ""
    """Signal on which it stopped at a step boundary."""
    stop_deadline: bool = False
    """It stopped by itself before the end of its time."""
    bad_nodes: tuple[str, ...] = ()
    """Hosts that failed the preflight."""
    host: str = ""
    """Where the first failing rank ran."""
    job: JobView | None = None
    ended_as: tuple[JobState, str] | None = None
    """How the scheduler ended the job according to the logs, and its words for people."""
    error: RankError | None = None
    log: str = ""
    """Ends of the batch log and of the first failing rank's log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """A cause, and what it was concluded from."""

    cause: Cause
    detail: str
    nodes: tuple[str, ...] = field(default=())
    """Hosts that the run should avoid from now on."""


_SIGNALS = {128 + 2: "SIGINT", 128 + 12: "SIGUSR2", 128 + 15: "SIGTERM"}
_KILLED = 128 + 9

_STATES = {
    JobState.PREEMPTED: Cause.PREEMPTED,
    JobState.TIMEOUT: Cause.TIMEOUT,
    JobState.NODE_FAIL: Cause.NODE_FAILURE,
    JobState.OUT_OF_MEMORY: Cause.OUT_OF_MEMORY,
}
"""States in which a scheduler ends a job by itself."""

_PATTERNS = (
    (re.compile(r"oom.?kill|Out Of Memory|CUDA out of memory|can't allocate memory", re.I), Cause.OUT_OF_MEMORY),
    (re.compile(r"No space left on device|Disk quota exceeded|MiB are free in"), Cause.DISK_FULL),
    (re.compile(r"uncorrectable ECC|fallen off the bus|CUDA-capable device\(s\) is/are busy"), Cause.BAD_NODE),
    (
        re.compile(
            r"NCCL error|nccl(?:Remote|System|Internal|UnhandledCuda)\w*|collective operation timeout|gloo/transport|"
            r"Connection (?:closed by peer|reset by peer|refused)|Broken pipe|"
            r"Communication connection failure|client socket has timed out|recvValue failed|EADDRINUSE"
        ),
        Cause.COMMUNICATION,
    ),
)
"""Looked for in error messages and at the end of logs; the first that matches counts."""

_KINDS = {
    "OutOfMemoryError": Cause.OUT_OF_MEMORY,
    "MemoryError": Cause.OUT_OF_MEMORY,
    "DistError": Cause.COMMUNICATION,
    "ConnectionError": Cause.COMMUNICATION,
    "UserCodeError": Cause.USER_CODE,
    "DataError": Cause.DATA,
    "ConfigError": Cause.CONFIG,
    "TrainingError": Cause.USER_CODE,
}
"""Classes of exceptions that tell the cause; of any other the message may."""


def classify(seen: Evidence) -> Diagnosis:
    """Return why the attempt ended."""
    if seen.exit_code == ExitCode.OK:
        return Diagnosis(cause=Cause.DONE, detail="exit code 0")
    if seen.cancelled:
        return Diagnosis(cause=Cause.CANCELLED, detail="by `launcher cancel`")
    return _by_scheduler(seen) or _by_exit_code(seen) or _by_error(seen) or _by_log(seen)


def _by_scheduler(seen: Evidence) -> Diagnosis | None:
    """Judge by the scheduler's view of the job and by the words that it leaves in the logs."""
    if seen.ended_as is not None and seen.ended_as[0] in _STATES:
        return Diagnosis(cause=_STATES[seen.ended_as[0]], detail=seen.ended_as[1])
    if seen.job is None:
        return None
    if seen.job.preempted:
        return Diagnosis(cause=Cause.PREEMPTED, detail="the scheduler gave notice of preemption")
    if seen.job.restarts > seen.restart:
        return Diagnosis(cause=Cause.PREEMPTED, detail="the scheduler is starting the job again by itself")
    if seen.job.state in _STATES:
        return Diagnosis(cause=_STATES[seen.job.state], detail=f"the scheduler calls the job {seen.job.state.value}")
    if seen.job.state in (JobState.COMPLETING, JobState.CANCELLED):  # its script still runs, so it is being ended
        return Diagnosis(cause=Cause.CANCELLED, detail="the scheduler ended the job on request")
    return None


def _by_exit_code(seen: Evidence) -> Diagnosis | None:
    code = seen.exit_code
    if code == ExitCode.SCHEDULER:
        return Diagnosis(cause=Cause.COMMUNICATION, detail="the scheduler's controller did not answer")
    if code == ExitCode.HANG:
        return Diagnosis(cause=Cause.HANG, detail="no rank finished a step in time")
    if code == ExitCode.BAD_NODE:
        return Diagnosis(cause=Cause.BAD_NODE, detail="a node failed the preflight", nodes=seen.bad_nodes)
    if code == ExitCode.REQUEUE or code in _SIGNALS:
        signal = seen.stop_signal or _SIGNALS.get(code, "")
        if seen.stop_deadline:
            return Diagnosis(cause=Cause.TIMEOUT, detail="it stopped in time before the end of the job")
        if signal == "SIGUSR2":
            return Diagnosis(cause=Cause.TIMEOUT, detail="it was told that its time limit is near (SIGUSR2)")
        if not seen.requeues or signal == "SIGINT":
            return Diagnosis(cause=Cause.CANCELLED, detail=f"it was asked to stop ({signal or 'by a signal'})")
        return Diagnosis(cause=Cause.PREEMPTED, detail=f"it was asked to stop ({signal or 'by a signal'})")
    return None


def _by_error(seen: Evidence) -> Diagnosis | None:
    """Judge by the exception of the first failing rank."""
    error = seen.error
    if error is None:
        return None
    detail = f"rank {error.rank}: {error.kinds[0]}: {_first_line(error.message)}"
    cause = next((_KINDS[kind] for kind in error.kinds if kind in _KINDS), None)
    cause = cause or _matching(error.message)
    if cause is None and "OSError" not in error.kinds and seen.exit_code == ExitCode.FAILURE:
        cause = Cause.USER_CODE
    if cause is None:
        return Diagnosis(cause=Cause.UNKNOWN, detail=detail)
    return _diagnosis(cause, detail, error.host or seen.host)


def _by_log(seen: Evidence) -> Diagnosis:
    """Judge by the last lines of the first failing rank's log, or of the batch log."""
    code = seen.exit_code
    cause = _matching(seen.log)
    if cause is not None:
        return _diagnosis(cause, f"exit code {code}, and the log says so", seen.host)
    if code == ExitCode.BAD_INPUT:
        return Diagnosis(cause=Cause.CONFIG, detail="exit code 2 (bad input)")
    if code == _KILLED:
        return Diagnosis(cause=Cause.UNKNOWN, detail="killed by signal 9, and nothing says by whom")
    return Diagnosis(cause=Cause.UNKNOWN, detail=f"exit code {code}")


def _diagnosis(cause: Cause, detail: str, host: str) -> Diagnosis:
    return Diagnosis(cause=cause, detail=detail, nodes=(host,) if cause is Cause.BAD_NODE and host else ())


def _matching(text: str) -> Cause | None:
    return next((cause for pattern, cause in _PATTERNS if pattern.search(text)), None)


def _first_line(text: str) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= 200 else f"{line[:197]}..."
