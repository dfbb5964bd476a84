"""States of jobs, asked of Slurm at most every few seconds by all shells of a user on one machine.

The last answer is kept in a private file that the shells share: a hundred `launcher wait` put no more load on the
controller than one. It can be shared because the question is always the same: every job of these users. An answer
that is older than a job's submission says nothing about that job, so a run just submitted is never taken for unknown.

Rejected: asking for the job ids of the runs at hand, which is another question in every shell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from launcher.contract.errors import SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.private_folder import private_folder
from launcher.contract.rundir import write_atomic
from launcher.scheduler.base import JobRecord
from launcher.scheduler.slurm import commands

KEPT_SECONDS = 5.0
"""How long squeue's answer is used, unless SFT_SCHEDULER_CACHE_SECONDS says otherwise; with 0 each call asks."""

_ACCOUNTS_KEPT_SECONDS = 60.0
"""How long sacct's answer is used: it is about jobs that squeue has dropped, whose state hardly changes."""

_Asking = Callable[[Sequence[str], float], dict[str, JobRecord]]
"""Asks sacct for the jobs with these ids that were submitted then or later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Slurm's records by job id, and why some may be missing; as in an `Answer`, of one cluster."""

    records: Mapping[str, JobRecord]
    problem: str | None = None
    doubt: str | None = None


class _MemoryFile(TypedDict):
    """The shared file's JSON."""

    asked: float
    problem: str | None
    queue: list[dict[str, object]]
    accounts: list[tuple[str, float, dict[str, object] | None]]


@dataclass(slots=True)
class _Memory:
    """The last answers, and when they were asked for."""

    asked: float = 0.0
    problem: str | None = None
    queue: dict[str, JobRecord] = field(default_factory=dict)
    accounts: dict[str, tuple[float, JobRecord | None]] = field(default_factory=dict)


def ask(jobs: Mapping[str, float], users: Sequence[int], *, fresh: bool = False, cluster: str = "") -> Found:
    """Return Slurm's records of `jobs` (job id → when it was submitted) of the users with these ids.

    They are all jobs of `cluster`, or of the one at hand if that is empty.
    Calls squeue and sacct at most once, however many jobs there are, and neither where another shell has just asked.
    With `fresh` it always asks: for callers that act on the answer.
    """
    if not jobs:
        return Found(records={})
    with _memory(users, cluster) as memory:
        kept = 0.0 if fresh else _kept_seconds()
        patience = commands.TIMEOUT_SECONDS if fresh else min(commands.TIMEOUT_SECONDS, commands.GLANCE_SECONDS)
        now = time.time()
        if not (now - kept < memory.asked <= now and memory.asked > max(jobs.values())):
            memory.asked = now
            try:
                memory.queue, memory.problem = commands.queue(users, cluster, patience), None
            except SchedulerError as error:
                memory.queue, memory.problem = {}, str(error)
                memory.asked = time.time()  # shells that waited meanwhile need not wait for the same silence again
        if memory.problem is not None:
            return Found(records={}, problem=memory.problem)
        forgotten = {job: at for job, at in jobs.items() if job not in memory.queue}
        doubt = _ask_accounts(
            memory, forgotten, kept > 0, functools.partial(commands.accounting, clusters=cluster, patience=patience)
        )
        accounts = {job: record for job, (_, record) in memory.accounts.items() if record is not None}
        return Found(records={**accounts, **memory.queue}, doubt=doubt)


def forget() -> None:
    """Drop the shared answers: this shell has just changed the queue."""
    folder = private_folder()
    for file in folder.glob("slurm-*.json") if folder is not None else ():
        file.unlink(missing_ok=True)


def _ask_accounts(memory: _Memory, forgotten: Mapping[str, float], may_be_old: bool, asking: _Asking) -> str | None:
    """Ask sacct for the jobs in `forgotten` that it was not asked for lately, and return its error message, if any."""
    since = time.time() - (_ACCOUNTS_KEPT_SECONDS if may_be_old else 0.0)
    memory.accounts = {job: entry for job, entry in memory.accounts.items() if entry[0] > since}
    wanted = [job for job in forgotten if job not in memory.accounts]
    if not wanted:
        return None
    try:
        answered = asking(wanted, min(forgotten[job] for job in wanted))
    except SchedulerError as error:
        return str(error)
    memory.accounts.update({job: (time.time(), answered.get(job)) for job in wanted})
    return None


def _kept_seconds() -> float:
    try:
        return float(os.environ.get("SFT_SCHEDULER_CACHE_SECONDS", KEPT_SECONDS))
    except ValueError:
        return KEPT_SECONDS


@contextlib.contextmanager
def _memory(users: Sequence[int], cluster: str) -> Iterator[_Memory]:
    """Yield the shared answers, and store them afterwards. Other shells wait meanwhile, to use the new ones."""
    folder = private_folder()
    if folder is None or _kept_seconds() <= 0:
        yield _Memory()
        return
    file = folder / f"slurm-{_key(users, cluster)}.json"
    with os.fdopen(os.open(file.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        memory = _read(file)
        yield memory
        with contextlib.suppress(OSError):  # a full disk only costs another question
            write_atomic(file, json.dumps(_as_json(memory)), mode=0o600)


def _key(users: Sequence[int], cluster: str) -> str:
    """Return a name for the cluster and the question, so that answers of different ones never mix."""
    asked = [os.environ.get("SLURM_CONF", ""), shutil.which("squeue") or "", cluster, *map(str, sorted(users))]
    return hashlib.sha256("\0".join(asked).encode(errors="surrogateescape")).hexdigest()[:16]


def _as_json(memory: _Memory) -> _MemoryFile:
    return {
        "asked": memory.asked,
        "problem": memory.problem,
        "queue": [dataclasses.asdict(record) for record in memory.queue.values()],
        "accounts": [
            (job, at, dataclasses.asdict(record) if record else None) for job, (at, record) in memory.accounts.items()
        ],
    }


def _read(file: Path) -> _Memory:
    """Return the answers in `file`, or empty ones where it does not exist or is of another version."""
    try:
        values: _MemoryFile = json.loads(file.read_text(encoding="utf-8"))
        queue = [_record(item) for item in values["queue"]]
        accounts = {job: (float(at), _record(item) if item else None) for job, at, item in values["accounts"]}
        by_id = {record.job_id: record for record in queue}
        return _Memory(float(values["asked"]), values["problem"], by_id, accounts)
    except (OSError, ValueError, TypeError, KeyError):
        return _Memory()


def _record(item: dict[str, object]) -> JobRecord:
    """Return the record in `item`. Raise TypeError or ValueError where it is of another version."""
    return dataclasses.replace(JobRecord(**item), state=JobState(item["state"]))  # type: ignore[arg-type]
