"""What Slurm's reasons mean, and what to do about them, for people who look at `status`."""

from __future__ import annotations

import dataclasses
import re

from launcher.contract.job import JobId
from launcher.contract.job_state import JobState
from launcher.scheduler.base import JobRecord

_ADVICE = {
    "DependencyNeverSatisfied": "it will never start; cancel it",
    "PartitionTimeLimit": "resources.time is above the partition's limit; cancel it and ask for less",
    "PartitionNodeLimit": "resources.nodes is not a number of nodes that the partition gives to one job; cancel it",
    "PartitionConfig": "the partition has no such nodes (GPUs, CPUs, memory or features), or not so many; cancel it",
    "JobArrayTaskLimit": "as many runs of the sweep are at work as sweep.max_at_once allows",
}
_CLAUSE = re.compile(r"(?P<kind>[a-z]+):(?P<job>[0-9_+*]+)(\((?P<state>[a-z]+)\))?")
_UNTIL = {"afterok": "to succeed", "afternotok": "to fail", "after": "to start", "aftercorr": "to succeed"}


def explained(record: JobRecord, job: JobId) -> JobRecord:
    """Return the record of `job` with what Slurm's reason means."""
    return dataclasses.replace(record, reason=_explained(record, job))


def _explained(record: JobRecord, job: JobId) -> str:
    reason = record.reason
    if record.state is JobState.HELD:
        at = f" --clusters={job.cluster}" if job.cluster else ""
        return f"{reason}: waits for `scontrol{at} release {job.text}`"
    if record.state in (JobState.COMPLETED, JobState.CANCELLED):
        return ""  # squeue goes on showing why the job once waited
    if reason == "Dependency" and record.waits_for:
        return f"{reason}: waits for {_awaited(record.waits_for)}"
    if reason == "BeginTime":
        known = record.expected_start is not None
        return f"{reason}: not before {'then' if known else 'a time that Slurm does not show'} (--begin, or a requeue)"
    return f"{reason}: {_ADVICE[reason]}" if reason in _ADVICE else reason


def _awaited(clauses: str) -> str:
    """Return `job 7 to succeed` for Slurm's `afterok:7(unfulfilled)`."""
    found = list(_CLAUSE.finditer(clauses))
    awaited = [f"job {clause['job']} {_UNTIL.get(clause['kind'], 'to end')}" for clause in found]
    others = "singleton" in clauses
    return " and ".join([*awaited, *(["other jobs of its name"] if others else [])]) or clauses
