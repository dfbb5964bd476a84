"""What Slurm says of jobs, asked at most every few seconds by all shells of a user on one machine.

The last answer is kept in a private file that the shells share: a hundred `launcher wait` put no more load on the
controller than one. It can be shared because the question is the same for all: every job of these users. An answer
that is older than a job's submission says nothing about that job, so a run just submitted is never taken for unknown.

Rejected: asking for the job ids of the runs at hand, which makes a question of its own for every shell.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launcher.contract.errors import SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.private_folder import private_folder
from launcher.contract.rundir import write_atomic
from launcher.scheduler import slurm
from launcher.scheduler.slurm import JobRecord

KEPT_SECONDS = 5.0
"""How long squeue's answer counts; SFT_SCHEDULER_CACHE_SECONDS says otherwise, 0 asks each time."""

_ACCOUNTS_KEPT_SECONDS = 60.0
"""sacct is only asked for jobs that squeue has forgotten: what it says of them hardly changes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """Slurm's records by job id, and its complaints."""

    records: Mapping[str, JobRecord]
    problem: str | None = None
    """Why squeue could not be asked: nothing is known then."""
    doubt: str | None = None
    """Why sacct could not be asked: a job that is in no record may be in its books."""


@dataclass(slots=True)
class _Memory:
    """What was answered lately, and when it was asked."""

    asked: float = 0.0
    problem: str | None = None
    queue: dict[str, JobRecord] = field(default_factory=dict)
    accounts: dict[str, tuple[float, JobRecord | None]] = field(default_factory=dict)


def ask(jobs: Mapping[str, float], users: Sequence[int], *, fresh: bool = False) -> Answer:
    """Slurm's word on `jobs` (job id → when it was submitted) of the users with these ids.

    At most one squeue and one sacct, however many jobs; none where another shell has just asked. `fresh` always asks:
    for who is about to act on the answer.
    """
    if not jobs:
        return Answer(records={})
    with _memory(users) as memory:
        kept = 0.0 if fresh else _kept_seconds()
        now = time.time()
        if not (now - kept < memory.asked <= now and memory.asked > max(jobs.values())):
            memory.asked = now
            try:
                memory.queue, memory.problem = slurm.queue(users), None
            except SchedulerError as error:
                memory.queue, memory.problem = {}, str(error)
        if memory.problem is not None:
            return Answer(records={}, problem=memory.problem)
        doubt = _ask_accounts(memory, {job: at for job, at in jobs.items() if job not in memory.queue}, kept > 0)
        accounts = {job: record for job, (_, record) in memory.accounts.items() if record is not None}
        return Answer(records={**accounts, **memory.queue}, doubt=doubt)


def forget() -> None:
    """Drop what was answered: this shell has just changed it."""
    folder = private_folder()
    for file in folder.glob("slurm-*.json") if folder is not None else ():
        file.unlink(missing_ok=True)


def _ask_accounts(memory: _Memory, forgotten: Mapping[str, float], may_be_old: bool) -> str | None:
    """Ask sacct for those jobs that squeue has forgotten and nobody has asked it for lately; its complaint, if any."""
    since = time.time() - (_ACCOUNTS_KEPT_SECONDS if may_be_old else 0.0)
    memory.accounts = {job: entry for job, entry in memory.accounts.items() if entry[0] > since}
    wanted = [job for job in forgotten if job not in memory.accounts]
    if not wanted:
        return None
    try:
        found = slurm.accounting(wanted, since=min(forgotten[job] for job in wanted))
    except SchedulerError as error:
        return str(error)
    memory.accounts.update({job: (time.time(), found.get(job)) for job in wanted})
    return None


def _kept_seconds() -> float:
    try:
        return float(os.environ.get("SFT_SCHEDULER_CACHE_SECONDS", KEPT_SECONDS))
    except ValueError:
        return KEPT_SECONDS


@contextlib.contextmanager
def _memory(users: Sequence[int]) -> Iterator[_Memory]:
    """What the shells of this user have in common; nobody else asks meanwhile, they wait for the answer."""
    folder = private_folder()
    if folder is None or _kept_seconds() <= 0:
        yield _Memory()
        return
    file = folder / f"slurm-{_key(users)}.json"
    with os.fdopen(os.open(file.with_suffix(".lock"), os.O_WRONLY | os.O_CREAT, 0o600), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        memory = _read(file)
        yield memory
        with contextlib.suppress(OSError):  # a full /tmp only costs a question
            write_atomic(file, json.dumps(_as_json(memory)), mode=0o600)


def _key(users: Sequence[int]) -> str:
    """Names the cluster and the question: answers of different ones never meet."""
    asked = [os.environ.get("SLURM_CONF", ""), shutil.which("squeue") or "", *map(str, sorted(users))]
    return hashlib.sha256("\0".join(asked).encode(errors="surrogateescape")).hexdigest()[:16]


def _as_json(memory: _Memory) -> dict[str, Any]:
    return {
        "asked": memory.asked,
        "problem": memory.problem,
        "queue": [dataclasses.asdict(record) for record in memory.queue.values()],
        "accounts": [[job, at, record and dataclasses.asdict(record)] for job, (at, record) in memory.accounts.items()],
    }


def _read(file: Path) -> _Memory:
    """The memory in `file`; an empty one where there is none, or one of another version."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        queue = [_record(item) for item in values["queue"]]
        accounts = {job: (float(at), item and _record(item)) for job, at, item in values["accounts"]}
        by_id = {record.job_id: record for record in queue}
        return _Memory(float(values["asked"]), values["problem"], by_id, accounts)
    except (OSError, ValueError, TypeError, KeyError):
        return _Memory()


def _record(item: dict[str, Any]) -> JobRecord:
    return JobRecord(**{**item, "state": JobState(item["state"])})
