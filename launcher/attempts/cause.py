"""Why an attempt ended, from what it left behind: exit code, events, Slurm's view of the job, error, log tails.

Pure: `launcher.attempts.attempt` gathers the evidence. What is certain comes first (a person's cancel, Slurm's own
words, exit codes that say what happened), then the error that the first failing rank recorded, then what its log ends
with. The others fail because it did, mostly with a broken connection, and are not asked.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum

from launcher.contract.exit_codes import ExitCode


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
class JobView:
    """What Slurm says of the job while its batch script ends."""

    state: str
    """Slurm's word; COMPLETING hides how it came to that."""
    restarts: int = 0
    """How often it has been started again, the next time included if Slurm has already decided that."""
    preempted: bool = False
    excluded: str = ""
    """Nodes it must not run on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankError:
    """The first error that a rank recorded (logs/<attempt>/error.json)."""

    kinds: tuple[str, ...]
    """Names of the exception's classes, its own first."""
    message: str
    rank: int = 0
    host: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What is known of the end of an attempt."""

    exit_code: int
    restart: int = 0
    """How often Slurm had started the job before this attempt."""
    local: bool = False
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
    error: RankError | None = None
    log: str = ""
    """Ends of the batch log and of the first failing rank's log."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A cause, and what it was concluded from."""

    cause: Cause
    detail: str
    nodes: tuple[str, ...] = field(default=())
    """Hosts on which the run must not start again."""


_SIGNALS = {128 + 2: "SIGINT", 128 + 12: "SIGUSR2", 128 + 15: "SIGTERM"}
_KILLED = 128 + 9

_LAST_WORDS = (
    (re.compile(r"DUE TO PREEMPTION"), Cause.PREEMPTED, "Slurm ended it for a job of higher priority"),
    (re.compile(r"DUE TO TIME LIMIT"), Cause.TIMEOUT, "Slurm ended it at its time limit"),
    (re.compile(r"DUE TO NODE FAILURE|srun: error: Node failure on"), Cause.NODE_FAILURE, "Slurm lost a node of it"),
    (re.compile(r"DUE TO JOB REQUEUE"), Cause.PREEMPTED, "it was requeued from outside"),
)
"""What slurmstepd and srun write when Slurm ends a job."""

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
"""In error messages and at the end of logs; the first that fits counts."""

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
"""Classes of exceptions that name the cause; for any other the message is looked at."""


def classify(seen: Evidence) -> Verdict:
    """Why the attempt ended."""
    if seen.exit_code == ExitCode.OK:
        return Verdict(cause=Cause.DONE, detail="exit code 0")
    if seen.cancelled:
        return Verdict(cause=Cause.CANCELLED, detail="by `launcher cancel`")
    return _by_slurm(seen) or _by_exit_code(seen) or _by_error(seen) or _by_log(seen)


def _by_slurm(seen: Evidence) -> Verdict | None:
    """Slurm's own doing, by its view of the job and the words it leaves in the logs."""
    for pattern, cause, detail in _LAST_WORDS:
        if pattern.search(seen.log):
            return Verdict(cause=cause, detail=detail)
    if seen.job is None:
        return None
    if seen.job.preempted:
        return Verdict(cause=Cause.PREEMPTED, detail="Slurm gave notice of preemption")
    if seen.job.restarts > seen.restart:
        return Verdict(cause=Cause.PREEMPTED, detail="Slurm is starting the job again by itself")
    named = {"NODE_FAIL": Cause.NODE_FAILURE, "TIMEOUT": Cause.TIMEOUT, "OUT_OF_MEMORY": Cause.OUT_OF_MEMORY}
    if seen.job.state in named:
        return Verdict(cause=named[seen.job.state], detail=f"Slurm calls the job {seen.job.state}")
    if seen.job.state in ("COMPLETING", "CANCELLED"):  # its script still runs, so Slurm is ending it
        return Verdict(cause=Cause.CANCELLED, detail="Slurm ended the job on request (scancel)")
    return None


def _by_exit_code(seen: Evidence) -> Verdict | None:
    code = seen.exit_code
    if code == ExitCode.HANG:
        return Verdict(cause=Cause.HANG, detail="no rank finished a step in time")
    if code == ExitCode.BAD_NODE:
        return Verdict(cause=Cause.BAD_NODE, detail="a node failed the preflight", nodes=seen.bad_nodes)
    if code == ExitCode.REQUEUE or code in _SIGNALS:
        signal = seen.stop_signal or _SIGNALS.get(code, "")
        if seen.stop_deadline:
            return Verdict(cause=Cause.TIMEOUT, detail="it stopped in time before the end of the job")
        if signal == "SIGUSR2":
            return Verdict(cause=Cause.TIMEOUT, detail="it was told that its time limit is near (SIGUSR2)")
        if seen.local or signal == "SIGINT":
            return Verdict(cause=Cause.CANCELLED, detail=f"it was asked to stop ({signal or 'by a signal'})")
        return Verdict(cause=Cause.PREEMPTED, detail=f"it was asked to stop ({signal or 'by a signal'})")
    return None


def _by_error(seen: Evidence) -> Verdict | None:
    """The exception of the first failing rank."""
    error = seen.error
    if error is None:
        return None
    detail = f"rank {error.rank}: {error.kinds[0]}: {_first_line(error.message)}"
    cause = next((_KINDS[kind] for kind in error.kinds if kind in _KINDS), None)
    cause = cause or _matching(error.message)
    if cause is None and "OSError" not in error.kinds and seen.exit_code == ExitCode.FAILURE:
        cause = Cause.USER_CODE
    if cause is None:
        return Verdict(cause=Cause.UNKNOWN, detail=detail)
    return _verdict(cause, detail, error.host or seen.host)


def _by_log(seen: Evidence) -> Verdict:
    """What the first failing rank's log, or srun, said last."""
    code = seen.exit_code
    cause = _matching(seen.log)
    if cause is not None:
        return _verdict(cause, f"exit code {code}, and the log says so", seen.host)
    if code == ExitCode.BAD_INPUT:
        return Verdict(cause=Cause.CONFIG, detail="exit code 2 (bad input)")
    if code == _KILLED:
        return Verdict(cause=Cause.UNKNOWN, detail="killed by signal 9, and nothing says by whom")
    return Verdict(cause=Cause.UNKNOWN, detail=f"exit code {code}")


def _verdict(cause: Cause, detail: str, host: str) -> Verdict:
    return Verdict(cause=cause, detail=detail, nodes=(host,) if cause is Cause.BAD_NODE and host else ())


def _matching(text: str) -> Cause | None:
    return next((cause for pattern, cause in _PATTERNS if pattern.search(text)), None)


def _first_line(text: str, limit: int = 200) -> str:
    line = (text.strip().splitlines() or [""])[0]
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
