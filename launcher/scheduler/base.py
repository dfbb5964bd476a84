"""The protocol of a scheduler, and the values that pass through it.

docs/adding-a-scheduler.md goes through the methods in the order in which one would write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from launcher.contract.errors import RunStateError, SchedulerError
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.schedulers import CAPABILITIES, Capabilities, SchedulerName
from launcher.contract.spec import ClusterSpec, ResourcesSpec


class SubmissionUnknown(SchedulerError):
    """The scheduler did not say whether it has made a job; `find` can tell later."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Intent:
    """A submission that was begun: what submission.json holds until the job is recorded."""

    token: str
    """Random mark that travels with the job, by which it is found again."""
    scheduler: SchedulerName
    written_at: float
    """Seconds since the epoch; the job is no older."""
    host: str
    """The machine that submits."""
    clusters: str = ""
    """Which of several clusters may get the job, as the scheduler's own option says it; empty for the one at hand."""
    candidate: str = ""
    """Of a race the candidate whose job it is (launcher.contract.race)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dependency:
    """A job to wait for, and how it must have ended."""

    job: JobId
    when: Literal["succeeded", "ended"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Array:
    """Many jobs by one submission."""

    size: int
    at_once: int | None = None
    """How many may run at the same time; None for no limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRequest:
    """A script to submit, with what is decided at each submission and so is not in the script."""

    name: str
    script: Path
    folder: Path
    """Where the scheduler may keep files of its own about the submission."""
    intent: Intent
    resources: ResourcesSpec
    hidden: tuple[str, ...] = ()
    """Variables of this shell that the job must not inherit, since they hold secrets."""
    waits_for: tuple[Dependency, ...] = ()
    exclude: str | None = None
    """Nodes to keep away from, as a host list."""
    array: Array | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """What a scheduler says of one job."""

    job_id: str
    state: JobState
    reason: str = ""
    """Why the job is in this state, for people."""
    exit_code: int | None = None
    signal: int | None = None
    start: str = ""
    name: str = ""
    """The job's name, where the scheduler may give its id to another job later."""
    waits_for: str = ""
    """The jobs that it waits for, in the scheduler's notation."""
    token: str = ""
    """The token of its submission, where the scheduler shows it: what has another token is another job."""

    @property
    def expected_start(self) -> str | None:
        """When a waiting job is to start in local time, or None where the scheduler has no plan for it yet."""
        return self.start.replace("T", " ") if self.start[:1].isdigit() else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A scheduler's records by the identity that was asked for, and why some may be missing."""

    records: Mapping[JobId, JobRecord]
    problem: str | None = None
    """Why the scheduler, or one of its clusters, could not be asked: a job without a record may be any then."""
    doubt: str | None = None
    """Why the accounting could not be asked: it may know a job that has no record here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """What the accounting says of one start of a job."""

    job: JobId
    state: JobState
    start: float
    """Seconds since the epoch."""
    end: float | None
    """None while it runs."""
    seconds: float
    """Time for which it held its nodes, a suspension left out."""
    nodes: int
    gpus: int | None
    """None where the accounting does not track GPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobView:
    """What a scheduler says of a job while its batch script ends."""

    state: JobState
    """RUNNING, unless the scheduler is ending the job by itself: COMPLETING hides why."""
    restarts: int = 0
    """How often the job was started again, including the next time if the scheduler has already decided on one."""
    preempted: bool = False
    excluded: str = ""
    """Nodes it must not run on, as a host list."""


class Scheduler(Protocol):
    """What the launcher needs of a scheduler.

    Implementations inherit from this class: methods with a body here have a default that suits a scheduler without the
    feature. Every method raises SchedulerError where the scheduler does not answer; silence never means "no job".
    """

    name: SchedulerName
    """As in cluster files; also the name of the default template, `<name>.sh.j2`."""
    title: str
    """For messages: `Slurm`, `this machine`."""
    noun: str = "job"
    """What people call one of its jobs."""
    submit_seconds: float = 0.0
    """Longest time that `submit` may take, its own clean-up included."""
    settle_seconds: float = 0.0
    """How long after the end of `submit` a job may still be invisible to `find`."""

    @property
    def capabilities(self) -> Capabilities:
        """What the scheduler can do."""
        return CAPABILITIES[self.name]

    def submit(self, request: JobRequest) -> Job:
        """Submit the script and return its job.

        SubmissionUnknown where it is open whether there is a job now, any other SchedulerError where there is none.
        """
        ...

    def find(self, name: str, intent: Intent, started: JobId | None) -> Job | None:
        """Return the job of a submission that was begun, or None where none can be seen now.

        `name` is the job's name; `started` is the job that has already reported its start in this run.
        """
        ...

    def states(self, jobs: Sequence[Job], owners: Sequence[int], *, fresh: bool) -> Answer:
        """Return the records of these jobs, all of the users with the ids `owners`.

        The number of questions to the scheduler must not grow with the number of jobs. An answer may be some seconds
        old, but not with `fresh`.
        """
        ...

    def allocations(self, jobs: Sequence[Job]) -> list[Allocation]:
        """Return every start of these jobs that the accounting knows, oldest first. None where there is none.

        The number of questions must not grow with the number of jobs.
        """
        return []

    def cancel(self, job: Job) -> None:
        """End a job. It is no error if the job has ended already.

        SchedulerError where there is none of this id.
        """
        ...

    def clusters_of(self, resources: ResourcesSpec) -> str:
        """Return which of several clusters a job with these resources is for, as the scheduler's own option says it."""
        return ""

    def cluster_at_hand(self) -> str:
        """Return the name of the cluster at hand, where the scheduler can have several."""
        return ""

    def go_on_as(self, old: JobId, new: JobId) -> None:
        """Have jobs that wait for `old` wait for `new`, which goes on with its run."""
        return

    def host_names(self, hosts: str) -> list[str]:
        """Return the hosts in a host list."""
        return [hosts]

    def unknown_nodes(self, hosts: Sequence[str], clusters: str = "") -> list[str]:
        """Return those of the hosts that the cluster has no node of."""
        return []

    def expected_start(self, script: str, clusters: str = "") -> str:
        """Return when and where the scheduler would start this script. Submits nothing."""
        return "not known"

    def array_elements(self, job: Job, size: int) -> list[Job]:
        """Return the jobs of an array."""
        raise NotImplementedError(f"{self.title} has no job arrays")

    def max_array_size(self) -> int:
        """Return how many jobs an array may have."""
        return 0

    def job_limits(self) -> dict[str, int]:
        """Return the limits on how many jobs this user may have queued, by their names."""
        return {}

    def cluster_problems(self, cluster: ClusterSpec, wanted: ResourcesSpec, script: Callable[[], str]) -> Iterator[str]:
        """Yield what is wrong with a cluster file, asked of the cluster itself.

        `wanted` are the file's default resources, `script` renders the script of a job with them.
        """
        return iter(())

    def beside(
        self, job: Job, hosts: Sequence[str], options: Sequence[str] = (), *, terminal: bool = False
    ) -> list[str]:
        """Return the words in front of a command that run it once on each of these hosts of a running job.

        It shares what the ranks have and takes nothing from them. `options` are the cluster's own (srun_args), and
        `terminal` gives the command the user's terminal. RunStateError where that cannot be done from here.
        """
        raise RunStateError(f"{self.title} starts nothing beside the ranks of a {self.noun}")

    def read_state(self, text: str) -> JobState:
        """Return the state in the answer of the template's `holder_state`, or UNKNOWN where it holds none."""
        return JobState.UNKNOWN

    def read_view(self, text: str) -> JobView | None:
        """Return what the answer of the template's `job_view` says, or None where it says nothing."""
        return None

    def read_log(self, text: str) -> tuple[JobState, str] | None:
        """Return how the scheduler ended the job according to what it writes into logs, and words for people."""
        return None
