"""What follows the end of an attempt: a pure decision over its cause, the restarts before it, and the policy.

Each cause has a budget of its own: restarts in a row without a new complete checkpoint. A restart after progress costs
nothing, and progress restores all budgets; so a run that makes progress is never given up for bad luck, and one that
makes none is not repeated for ever. A single step an attempt is no progress: something stops each attempt at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.attempts.cause import Cause, Diagnosis
from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import RestartSpec

LEAST_STEPS = 2
"""Steps by which the newest checkpoint must have grown for a restart to be free."""

_FINAL = {
    Cause.DONE: "nothing is left to do",
    Cause.CANCELLED: "a person ended it; `launcher resubmit` goes on",
    Cause.USER_CODE: "the same code would fail again; fix it, then `launcher resubmit`",
    Cause.DATA: "the same data would be refused again; fix them, then `launcher resubmit`",
    Cause.CONFIG: "the same settings would be refused again; fix them, then `launcher resubmit` with overrides",
}
"""Causes after which nothing starts by itself, whatever the policy."""

_REMEDY = {
    Cause.TIMEOUT: "a longer resources.time, or checkpoint.every lower",
    Cause.OUT_OF_MEMORY: "a smaller micro-batch, recomputation or more GPUs",
    Cause.DISK_FULL: "free space, or keep fewer checkpoints (checkpoint.keep_last)",
}

_ENDS_THE_JOB = (Cause.PREEMPTED, Cause.TIMEOUT)
"""Causes after which a job may not keep its nodes."""


class Action(StrEnum):
    """What the batch script does now."""

    REQUEUE = "requeue"
    IN_PLACE = "in_place"
    """The ranks start again within the job, on its own nodes."""
    RESUBMIT = "resubmit"
    LEAVE = "leave"
    """The scheduler starts the job again by itself."""
    STOP = "stop"
    WITHDRAW = "withdraw"
    """The scheduler would start the job again, and must not."""

    @property
    def goes_on(self) -> bool:
        """Another attempt follows by itself."""
        return self in (Action.REQUEUE, Action.IN_PLACE, Action.RESUBMIT, Action.LEAVE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Past:
    """An earlier decision since a person last submitted the run."""

    cause: Cause
    goes_on: bool
    progressed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What follows, and why."""

    action: Action
    reason: str
    budget: int | None = None
    left: int | None = None
    """Restarts for this cause that are left if there is no progress."""


def decide(
    diagnosis: Diagnosis,
    exit_code: int,
    past: Sequence[Past],
    policy: RestartSpec,
    *,
    progressed: bool,
    requeued: bool = False,
    requeues: bool = True,
    in_place: bool = False,
) -> Decision:
    """Return what follows an attempt.

    `requeued`: the scheduler has already put the job back into the queue. `requeues`: it can do that, and gives a job
    its whole time limit again. `in_place`: the job has enough nodes to start the ranks on again.
    """
    refused = _refusal(diagnosis.cause, exit_code, policy, requeues=requeues)
    stop = Action.WITHDRAW if requeued else Action.STOP
    if refused is not None:
        return Decision(action=stop, reason=refused)
    budget = policy.budget(diagnosis.cause.value)
    used = 0 if progressed else spent(diagnosis.cause, past)
    if budget == 0 or (not progressed and used >= budget):
        return Decision(action=stop, reason=_exhausted(diagnosis.cause, budget), budget=budget, left=0)
    left = budget if progressed else budget - used - 1
    why = "it wrote a checkpoint, so this restart is free" if progressed else f"restart {used + 1} of {budget} without"
    reason = why if progressed else f"{why} progress"
    action = Action.LEAVE if requeued else _way_on(diagnosis.cause, policy, in_place=in_place)
    return Decision(action=action, reason=reason, budget=budget, left=left)


def _way_on(cause: Cause, policy: RestartSpec, *, in_place: bool) -> Action:
    """Return how the run goes on."""
    if policy.how != "in_place":
        return Action(policy.how)
    return Action.IN_PLACE if in_place and cause not in _ENDS_THE_JOB else Action.REQUEUE


def spent(cause: Cause, past: Sequence[Past]) -> int:
    """Return how many restarts for `cause` there were since the run last wrote a checkpoint."""
    count = 0
    for earlier in reversed(past):
        if earlier.progressed:
            break
        count += earlier.goes_on and earlier.cause is cause
    return count


def _refusal(cause: Cause, exit_code: int, policy: RestartSpec, *, requeues: bool) -> str | None:
    """Return why nothing may start by itself, whatever the budgets, or None where it may."""
    if cause in _FINAL:
        return _FINAL[cause]
    if exit_code == ExitCode.NEVER_REQUEUE:
        return f"exit code {exit_code} asks never to be started again"
    if exit_code == ExitCode.CONFLICT:
        return "another attempt holds the run"
    if policy.how == "none":
        return "restart.how is none; `launcher resubmit` goes on"
    if not requeues and cause is Cause.TIMEOUT:
        return "a local run ends with its time limit; `launcher resubmit` goes on"
    return None


def _exhausted(cause: Cause, budget: int) -> str:
    remedy = f" Try {_REMEDY[cause]}." if cause in _REMEDY else ""
    spent_all = f"all {budget} restarts without progress are used up" if budget else "it is not restarted"
    return f"{spent_all} (restart.{cause.value}: {budget}).{remedy} `launcher resubmit` goes on"
