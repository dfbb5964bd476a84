"""What Slurm's reasons mean to a person."""

from __future__ import annotations

import pytest

from launcher.contract.job import JobId
from launcher.contract.job_state import JobState
from launcher.scheduler.base import JobRecord
from launcher.scheduler.slurm.reasons import explained


@pytest.mark.parametrize(
    ("reason", "waits_for", "start", "said"),
    [
        ("Dependency", "afterok:7(unfulfilled)", "N/A", "Dependency: waits for job 7 to succeed"),
        (
            "Dependency",
            "afterany:7_*(unfulfilled),singleton(unfulfilled)",
            "N/A",
            "Dependency: waits for job 7_* to end and other jobs of its name",
        ),
        ("Dependency", "", "N/A", "Dependency"),
        ("BeginTime", "", "2026-01-01T00:00:00", "BeginTime: not before then (--begin, or a requeue)"),
        ("BeginTime", "", "N/A", "BeginTime: not before a time that Slurm does not show (--begin, or a requeue)"),
        ("Priority", "", "N/A", "Priority"),
    ],
)
def test_what_a_job_waits_for(reason: str, waits_for: str, start: str, said: str) -> None:
    record = JobRecord(job_id="8", state=JobState.PENDING, reason=reason, waits_for=waits_for, start=start)
    assert explained(record, JobId("8", "slurm")).reason == said


@pytest.mark.parametrize(
    "reason", ["PartitionTimeLimit", "PartitionNodeLimit", "PartitionConfig", "DependencyNeverSatisfied"]
)
def test_jobs_that_will_never_start_say_what_to_do(reason: str) -> None:
    record = JobRecord(job_id="8", state=JobState.PENDING, reason=reason)
    assert explained(record, JobId("8", "slurm")).reason.startswith(f"{reason}: ")
    assert "cancel it" in explained(record, JobId("8", "slurm")).reason


def test_a_held_job_is_released_where_it_is() -> None:
    record = JobRecord(job_id="8", state=JobState.HELD, reason="JobHeldUser")
    assert "`scontrol release 8`" in explained(record, JobId("8", "slurm")).reason
    assert "`scontrol --clusters=far release 8`" in explained(record, JobId("8", "slurm", cluster="far")).reason
