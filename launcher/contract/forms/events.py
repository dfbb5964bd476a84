"""The form of events.jsonl: a dataclass for each event, its fields as a line has them.

A field with a default may be absent. The docstring of a class says when the event is written; the schema
`events` and docs/reference/json.md are made from this file, and tests hold every event that a test run writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from launcher.contract.schedulers import SchedulerName

CauseName = Literal[
    "done",
    "preempted",
    "timeout",
    "cancelled",
    "node_failure",
    "out_of_memory",
    "communication",
    "hang",
    "bad_node",
    "user_code",
    "data",
    "config",
    "disk_full",
    "unknown",
]
"""launcher.attempts.cause.Cause, whose words these are."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """What all events have."""

    time: float
    """Seconds since the epoch."""


@dataclass(frozen=True, kw_only=True)
class OfAttempt(Event):
    """What all events of an attempt have."""

    attempt: str
    """The attempt's name."""


@dataclass(frozen=True, kw_only=True)
class Submitted(Event):
    """A job was made."""

    event: Literal["submitted"]
    job_id: str
    """The job's id, as the scheduler writes it."""
    scheduler: SchedulerName
    """Whose id it is."""
    cluster: str = ""
    """Where Slurm has several, the cluster that the job was sent to."""
    attempt: str = ""
    """The attempt that submitted it, where the run did so itself."""
    by: str = ""
    """The same."""
    token: str = ""
    """Its mark, where the run submitted it itself."""
    candidate: str = ""
    """The cluster or partition that it is for, where it is one of several (`submit --first-of`)."""


@dataclass(frozen=True, kw_only=True)
class AttemptStarted(OfAttempt):
    """The batch script holds the run."""

    event: Literal["attempt_started"]
    job_id: str
    """The attempt's job."""
    host: str
    """Where the batch script runs."""
    scheduler: str = ""
    """Whose id it is; absent in programs that train by themselves, as those of trlx."""
    cluster: str = ""
    """Slurm's name of the cluster."""
    nodes: str = ""
    """Where the ranks run, as a host list."""


@dataclass(frozen=True, kw_only=True)
class LeaseTakenOver(OfAttempt):
    """It took the lease of an attempt that is over."""

    event: Literal["lease_taken_over"]
    holder: str
    """That attempt."""


@dataclass(frozen=True, kw_only=True)
class LeaseRefused(OfAttempt):
    """Another attempt holds the run; this one exits with 4."""

    event: Literal["lease_refused"]
    reason: str
    """Who holds it."""


@dataclass(frozen=True, kw_only=True)
class RaceWon(OfAttempt):
    """Of the jobs of `submit --first-of`, this one has started first and has the run."""

    event: Literal["race_won"]
    job_id: str
    """Its job."""
    candidate: str
    """The cluster or partition that it is for."""


@dataclass(frozen=True, kw_only=True)
class Prepared(OfAttempt):
    """Model and data are ready."""

    event: Literal["prepared"]


@dataclass(frozen=True, kw_only=True)
class NodeCheck:
    """One check of the preflight."""

    name: str
    """What was checked."""
    ok: bool
    """Whether it passed."""
    detail: str
    """What was found."""
    fault: Literal["node", "run"]
    """Whose fault a failure is."""


@dataclass(frozen=True, kw_only=True)
class CheckedNode:
    """What the preflight found on a node."""

    host: str
    """The node."""
    checks: tuple[NodeCheck, ...]
    """Its checks; in an event those that failed."""


@dataclass(frozen=True, kw_only=True)
class PreflightFailed(OfAttempt):
    """Nodes failed the preflight."""

    event: Literal["preflight_failed"]
    nodes: tuple[CheckedNode, ...]
    """The nodes that did."""


@dataclass(frozen=True, kw_only=True)
class TrainingStarted(OfAttempt):
    """Training begins."""

    event: Literal["training_started"]
    step: int
    """After this step."""
    max_steps: int
    """Steps in all."""


@dataclass(frozen=True, kw_only=True)
class RestartedInPlace(OfAttempt):
    """Training goes on in the same job."""

    event: Literal["restarted_in_place"]
    after: str
    """The attempt before."""
    cause: CauseName
    """Why that one ended."""
    step: int
    """Training goes on after this step."""
    steps_lost: int = 0
    """Steps to do again; absent where the attempt before had logged none."""
    seconds_lost: float = 0.0
    """Since the last logged step; absent where the attempt before had logged none."""


@dataclass(frozen=True, kw_only=True)
class CopyUsed(OfAttempt):
    """A restart in place goes on from a copy in the nodes' memory."""

    event: Literal["copy_used"]
    step: int
    """Of which step it is."""
    made_by: str
    """The attempt that made it."""
    fetched: tuple[int, ...]
    """The ranks that got their part of it from another node."""


@dataclass(frozen=True, kw_only=True)
class CopyNotUsed(OfAttempt):
    """A restart in place found no copy in the nodes' memory to go on from."""

    event: Literal["copy_not_used"]
    step: int
    """Of the checkpoint that it goes on from; 0 where there is none."""
    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class FirstCopy(OfAttempt):
    """The first copy of an attempt is in the nodes' memory; later ones have no event."""

    event: Literal["first_copy"]
    step: int
    """Of which step it is."""
    bytes: int
    """Size of rank 0's part."""
    seconds: float
    """How long all ranks took for it."""


@dataclass(frozen=True, kw_only=True)
class CopyFailed(OfAttempt):
    """A copy could not be made; training goes on, and the copy before is kept."""

    event: Literal["copy_failed"]
    step: int
    """Of which step it would have been."""
    reason: str
    """The error of the first rank that had one."""


@dataclass(frozen=True, kw_only=True)
class CopiesOff(OfAttempt):
    """This attempt makes no copies, although checkpoint.copy_every asks for them."""

    event: Literal["copies_off"]
    reason: str
    """Why."""


@dataclass(frozen=True, kw_only=True)
class FirstStep(OfAttempt):
    """The first two steps of an attempt are done, or its only one: what the first has waited for."""

    event: Literal["first_step"]
    step: int
    """The first step."""
    seconds: float
    """From the submission, or the end of the attempt before, to the end of that step."""
    phases: dict[str, float]
    """Seconds of each phase, in their order, which add up to `seconds`: queue (to the begin of the batch script),
    script (its environment, and the lease of the run), prepare, preflight (where it is enabled), start of ranks (until
    rank 0's Python runs), imports, data (config, tokens, order of batches), process groups, weights (the model is built
    and filled), optimizer, checkpoint (in an attempt that goes on), start of the loop, evaluation and first batch,
    first step."""
    warm_up: float = 0.0
    """Seconds that the first step took longer than the second: compiling kernels, making communicators."""


@dataclass(frozen=True, kw_only=True)
class MetricsLost(OfAttempt):
    """metrics.jsonl has no line for steps that are done."""

    event: Literal["metrics_lost"]
    steps: tuple[tuple[int, ...], ...]
    """The first gaps: the last step before each, and the first after it."""
    gaps: int
    """Their number in all."""


@dataclass(frozen=True, kw_only=True)
class CheckpointSaved(OfAttempt):
    """A checkpoint is complete."""

    event: Literal["checkpoint_saved"]
    step: int
    """Its step."""
    seconds: float
    """How long it took."""
    best: tuple[int, ...]
    """Steps of the checkpoints that are kept as the best."""


@dataclass(frozen=True, kw_only=True)
class BadStep(OfAttempt):
    """An update was not applied."""

    event: Literal["bad_step"]
    step: int
    """The step."""
    reason: Literal["spike", "not finite"]
    """What was wrong with it."""
    policy: str
    """What the config says should follow."""
    examples: int
    """Number of its examples, whose ids are in bad_steps.jsonl."""
    loss: float | None
    """Its loss; null where it is no finite number."""
    grad_norm: float | None
    """Its gradient norm; null where it is no finite number."""


@dataclass(frozen=True, kw_only=True)
class Rewound(OfAttempt):
    """Weights and optimizer went back."""

    event: Literal["rewound"]
    step: int
    """At this step."""
    checkpoint: str
    """To this checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RankPosition:
    """Where a rank stood when an attempt hung."""

    rank: int
    """The rank."""
    host: str
    """Its node."""
    pid: int
    """Its process."""
    step: int
    """Number of steps that it had finished."""
    phase: str
    """What it was doing."""
    seconds: float
    """For how long."""
    where: str
    """Innermost frame of its main thread, as file:line function."""
    waiting: bool
    """Whether that frame waits for other ranks."""
    answered: bool
    """Whether it answered when asked."""
    process: str
    """State in the kernel of a process that gave no answer, e.g. T (stopped)."""


@dataclass(frozen=True, kw_only=True)
class HangDetected(OfAttempt):
    """The watchdog ends the attempt."""

    event: Literal["hang_detected"]
    allowed_seconds: float
    """How long a step may take."""
    step: int
    """The last step that all ranks finished."""
    told_apart: bool
    """Whether some ranks were behind the others."""
    behind: tuple[RankPosition, ...]
    """The ranks that were furthest behind."""


@dataclass(frozen=True, kw_only=True)
class StopRequested(OfAttempt):
    """Ranks stop at this step."""

    event: Literal["stop_requested"]
    step: int
    """The step."""
    signal: str | None
    """The signal that asked for it; null where rank 0 got none."""
    deadline: bool
    """Whether it was by the clock, not by a signal."""


@dataclass(frozen=True, kw_only=True)
class StoppedEarly(OfAttempt):
    """Early stopping."""

    event: Literal["stopped_early"]
    step: int
    """The step."""
    metric: str
    """The metric that no longer improved."""
    best_step: int | None
    """Where it was best."""


@dataclass(frozen=True, kw_only=True)
class TrainingFinished(OfAttempt):
    """The last step is done."""

    event: Literal["training_finished"]
    step: int
    """The step."""
    seconds: float
    """Since training began in this attempt."""


@dataclass(frozen=True, kw_only=True)
class Exported(OfAttempt):
    """The model is written."""

    event: Literal["exported"]
    path: str
    """Where."""
    step: int
    """Of which checkpoint."""
    why: str
    """Why of that one."""


@dataclass(frozen=True, kw_only=True)
class RestartDecided(OfAttempt):
    """What follows the attempt."""

    event: Literal["restart_decided"]
    exit_code: int
    """How the attempt ended."""
    cause: CauseName
    """Why it ended."""
    detail: str
    """What that was concluded from."""
    decision: Literal["requeue", "in_place", "resubmit", "leave", "stop", "withdraw"]
    """What follows; `in_place`: the ranks start again within the job; `leave`: Slurm starts the job again by itself;
    `withdraw`: Slurm would, and must not."""
    reason: str
    """Why, and what to change before the next try."""
    budget: int | None
    """Restarts without progress that the policy allows for this cause."""
    budget_left: int | None
    """How many of them are left."""
    step: int
    """Step of the newest complete checkpoint."""
    progressed: bool
    """Whether the attempt wrote one that counts."""
    avoid: tuple[str, ...] = ()
    """Nodes that the run keeps away from, from now on."""
    nodes: tuple[str, ...] = ()
    """In place: where the ranks start again; empty where the scheduler has no nodes."""
    reached: int = 0
    """In place: the last step that was logged."""
    reached_at: float = 0.0
    """In place: when that was, in seconds since the epoch; absent where no step was logged."""


@dataclass(frozen=True, kw_only=True)
class AttemptEnded(OfAttempt):
    """The last event of an attempt."""

    event: Literal["attempt_ended"]
    exit_code: int
    """How it ended."""
    detail: str = ""
    """Why, where it ended before it held the run."""


@dataclass(frozen=True, kw_only=True)
class CancelledByUser(Event):
    """`launcher cancel` was called."""

    event: Literal["cancelled"]
    job_id: str
    """The job that it ended."""
    cluster: str = ""
    """Where Slurm has several, the job's cluster."""


EVENTS = (
    Submitted,
    AttemptStarted,
    LeaseTakenOver,
    LeaseRefused,
    RaceWon,
    Prepared,
    PreflightFailed,
    TrainingStarted,
    RestartedInPlace,
    CopyUsed,
    CopyNotUsed,
    FirstCopy,
    CopyFailed,
    CopiesOff,
    FirstStep,
    MetricsLost,
    CheckpointSaved,
    BadStep,
    Rewound,
    HangDetected,
    StopRequested,
    StoppedEarly,
    TrainingFinished,
    Exported,
    RestartDecided,
    AttemptEnded,
    CancelledByUser,
)
"""Every event, in the order in which a run may meet them."""
