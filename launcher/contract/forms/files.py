"""The forms of a run's JSON files that other programs may read. A field with a default may be absent.

Their schemas and docs/reference/json.md are made from this file. Tests hold every file that a test run writes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from launcher.contract.forms.events import CheckedNode, RankPosition
from launcher.contract.schedulers import SchedulerName


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The newest numbers of a run, replaced every few seconds by rank 0."""

    attempt: str
    """The attempt whose numbers they are."""
    max_steps: int
    """Steps in all."""
    checkpoint: str | None
    """The newest complete checkpoint of this attempt."""
    time: float
    """When it was written, in seconds since the epoch."""
    step: int
    """Optimizer steps done."""
    loss: float
    """Of that step. Python writes NaN and Infinity as such, which JSON does not have."""
    grad_norm: float
    """Gradient norm before clipping."""
    lr: float
    """Learning rate."""
    tokens_per_second: float
    """Of all ranks, since the logged step before."""
    consumed_examples: int
    """Examples of all steps so far."""
    eta_seconds: float
    """Seconds until the last step."""
    mfu: float = 0.0
    """On GPUs: share of their peak that the model's own products took."""
    first_step_seconds: float = 0.0
    """Once the first step is done: its time since the submission, or since the end of the attempt before."""


@dataclass(frozen=True, kw_only=True)
class ManifestJob:
    """One job of a run."""

    job_id: str
    """Its id, as the scheduler writes it."""
    scheduler: SchedulerName
    """Whose id it is."""
    submitted_at: float
    """Seconds since the epoch."""
    host: str
    """Where a local process runs."""
    process_start: int | None
    """Start time of a local process, in clock ticks since boot."""
    token: str
    """Random mark of the submission."""
    cluster: str = ""
    """Where Slurm has several, the cluster that it was sent to."""


@dataclass(frozen=True, kw_only=True)
class ManifestFile:
    """Who submitted a run, when, from which code, and every job it has had."""

    name: str
    """The run's name."""
    created_at: float
    """Seconds since the epoch."""
    submitter: str
    """The user who submitted it."""
    host: str
    """Where that was."""
    command: tuple[str, ...]
    """The words of the command."""
    versions: dict[str, str]
    """Package to version on that machine, with python and its executable."""
    source: dict[str, object]
    """Top of each source tree to its Git commit and whether it was changed."""
    topology: dict[str, object]
    """The parallel sizes, and `summary`: all in one line."""
    parent_run: str | None
    """Directory of the run that it was made from."""
    group: str | None
    """The sweep that it belongs to."""
    attempts: tuple[ManifestJob, ...]
    """Every job, oldest first."""
    digests: dict[str, str] = field(default_factory=dict)
    """File that a job starts from to its SHA-256."""
    given_resources: tuple[str, ...] | None = None
    """Keys of `resources` that the user wrote; at another cluster the others are of that cluster's file."""


@dataclass(frozen=True, kw_only=True)
class ErrorFile:
    """The exception of the rank that failed first, logs/<attempt>/error.json."""

    kinds: tuple[str, ...]
    """Names of the exception's classes, its own first."""
    message: str
    """Its message, in full."""
    rank: int
    """The rank."""
    host: str
    """Its node."""


@dataclass(frozen=True, kw_only=True)
class PreflightFile:
    """What each node found before training, preflight/<attempt>.json."""

    attempt: str
    """The attempt."""
    seconds: float
    """How long it took."""
    nodes: tuple[CheckedNode, ...]
    """The nodes."""


Hang = tuple[RankPosition, ...]
"""Where each rank stood when the attempt hung, logs/<attempt>/hang.json."""


@dataclass(frozen=True, kw_only=True)
class MetricsLine:
    """A line of metrics.jsonl: a logged step, or an evaluation.

    An evaluation has `eval_loss/<set>` and `metric/<name>` as well, a step of a model with experts `router/...`. An
    attempt that goes on first removes the lines of steps that it does again.
    """

    step: int
    """Optimizer steps done."""
    loss: float = 0.0
    """Mean loss of the step's targets."""
    grad_norm: float = 0.0
    """Gradient norm before clipping."""
    lr: float = 0.0
    """Learning rate."""
    tokens_per_second: float = 0.0
    """Of all ranks, since the logged step before."""
    mfu: float = 0.0
    """On GPUs: share of their peak that the model's own products took."""
    consumed_examples: int = 0
    """Examples of all steps so far."""
    examples: int = 0
    """Examples of the step."""
    tokens: int = 0
    """Its tokens."""
    supervised_tokens: int = 0
    """Its targets."""
    eval_loss: float = 0.0
    """Of an evaluation: mean loss of the held-out targets."""
    perplexity: float = 0.0
    """Of an evaluation: exp of the loss."""


@dataclass(frozen=True, kw_only=True)
class Notification:
    """What `notify` posts to a webhook and pipes to a command."""

    run: str
    """The run's name."""
    directory: str
    """The run's directory."""
    attempt: str
    """The attempt that ended."""
    outcome: Literal["completed", "interrupted", "failed"]
    """How."""
    exit_code: int
    """Its exit code."""
    host: str
    """Where its batch script ran."""
    time: float
    """When, in seconds since the epoch."""
    step: int | None
    """The newest logged step."""
    max_steps: int | None
    """Steps in all."""
    loss: float | None
    """Of that step."""
    checkpoint: str | None
    """The newest complete checkpoint."""
    text: str
    """All of it in a sentence."""
