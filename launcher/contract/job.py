"""What a job is: its identity, what is recorded of it, and the names of its attempts.

A job is what was submitted: a batch job, or a process on this machine. An attempt is one start of a job; a scheduler
that requeues a job starts it again under the same id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.contract.schedulers import SchedulerName, scheduler_name

_STARTED = re.compile(r"(?P<job>[^.]+)\.(?P<restart>[0-9]+)(?:-(?P<generation>[0-9]+))?")


@dataclass(frozen=True, slots=True)
class JobId:
    """The identity of a job: the scheduler's own id, who gave it, and the token it was submitted with."""

    text: str
    """The id as the scheduler writes it: `123`, `123_4` for an element of a Slurm array, a process id."""
    scheduler: SchedulerName
    """The scheduler's name in cluster files."""
    token: str = ""
    """Random mark of the submission, by which a job is found again; empty for a job that nobody recorded."""
    cluster: str = ""
    """The cluster of a multi-cluster Slurm that the job was sent to; empty for that of the login node. Ids of different
    clusters may be the same."""

    def __str__(self) -> str:
        return f"{self.text};{self.cluster}" if self.cluster else self.text  # as `sbatch --parsable` writes it

    def is_job(self, text: object, cluster: object) -> bool:
        """Return whether `text` and `cluster` name this job. A cluster that is not known may be any."""
        return text == self.text and (not cluster or not self.cluster or cluster == self.cluster)


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A submitted job, as the manifest records it."""

    id: JobId
    submitted_at: float
    """Seconds since the epoch."""
    host: str = ""
    """Where a local process runs."""
    process_start: int | None = None
    """Start time of a local process in clock ticks since boot: process ids are reused, the pair is not."""

    def as_json(self) -> dict[str, object]:
        """Return the record as run directories store it."""
        return {
            "job_id": self.id.text,
            "scheduler": self.id.scheduler,
            "submitted_at": self.submitted_at,
            "host": self.host,
            "process_start": self.process_start,
            "token": self.id.token,
            **({"cluster": self.id.cluster} if self.id.cluster else {}),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> Job:
        """Read what `as_json` wrote, here or in an earlier version.

        Raise KeyError, TypeError or ValueError where it is something else.
        """
        start = values.get("process_start")
        return cls(
            id=JobId(
                str(values["job_id"]),
                scheduler_name(values["scheduler"]),
                str(values.get("token", "")),
                str(values.get("cluster", "")),
            ),
            submitted_at=_number(values["submitted_at"]),
            host=str(values.get("host", "")),
            process_start=None if start is None else int(_number(start)),
        )


def job_fields(job: JobId) -> dict[str, str]:
    """Return how events name a job."""
    return {"job_id": job.text, **({"cluster": job.cluster} if job.cluster else {})}


def _number(value: object) -> float:
    if isinstance(value, int | float):
        return value
    raise TypeError(f"{value!r} is not a number")


@dataclass(frozen=True, slots=True)
class AttemptName:
    """The name of an attempt, which is also that of its folder of logs.

    `<job id>.<restart count>`, or `local-<n>` on this machine. Where ranks were started again in place, within one
    start of their job, the number of those restarts follows: `<job id>.<restart count>-<generation>`.
    """

    text: str

    @property
    def job(self) -> str | None:
        """The job's id where the name has one, otherwise None."""
        match = _STARTED.fullmatch(self.text)
        return match["job"] if match else None

    @property
    def restart(self) -> int | None:
        """How often the scheduler had started the job before, or None where the name does not say."""
        match = _STARTED.fullmatch(self.text)
        return int(match["restart"]) if match else None

    @property
    def generation(self) -> int:
        """How often ranks had been started in place before, within this start of the job."""
        match = _STARTED.fullmatch(self.text)
        return int(match["generation"] or 0) if match else 0

    @property
    def next_in_place(self) -> str | None:
        """The attempt that follows in place, or None where the name does not tell."""
        job, restart = self.job, self.restart
        return None if job is None else f"{job}.{restart}-{self.generation + 1}"

    @property
    def scheduler(self) -> SchedulerName:
        """The scheduler of an attempt whose event does not name it, as in runs of earlier versions."""
        return "slurm" if _STARTED.fullmatch(self.text) else "local"
