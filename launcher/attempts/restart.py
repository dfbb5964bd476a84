"""What follows the end of an attempt: a pure decision over its cause, the restarts before it, and the policy.

Each cause has a budget of its own: restarts in a row without a new complete checkpoint. A restart after progress costs
nothing, and progress makes all budgets whole again; so a run that gets anywhere is never given up for bad luck, and one
that does not get anywhere is not repeated for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from launcher.attempts.cause import Cause, Verdict
from launcher.contract.exit_codes import ExitCode
from launcher.contract.spec import RestartSpec

_FINAL = {
    Cause.DONE: "nothing is left to do",
    Cause.CANCELLED: "a person ended it; `launcher resubmit` goes on",
    Cause.USER_CODE: "the same code would fail again; mend it, then `launcher resubmit`",
    Cause.DATA: "the same data would be refused again; mend them, then `launcher resubmit`",
    Cause.CONFIG: "the same settings would be refused again; mend them, then `launcher resubmit` with overrides",
}
"""Causes after which nothing starts by itself, whatever the policy."""

_REMEDY = {
    Cause.TIMEOUT: "a longer resources.time, or checkpoint.every lower",
    Cause.OUT_OF_MEMORY: "a smaller micro-batch, recomputation or more GPUs",
    Cause.DISK_FULL: "free space, or keep fewer checkpoints (checkpoint.keep_last)",
}


class Action(StrEnum):
    """What the batch script does now."""

    REQUEUE = "requeue"
    RESUBMIT = "resubmit"
    LEAVE = "leave"
    """Slurm starts the job again by itself."""
    STOP = "stop"
    WITHDRAW = "withdraw"
    """Slurm would start the job again, and must not."""

    @property
    def goes_on(self) -> bool:
        """Another attempt follows by itself."""
        return self in (Action.REQUEUE, Action.RESUBMIT, Action.LEAVE)


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
    """Restarts for this cause that are left without progress."""


def decide(
    verdict: Verdict,
    exit_code: int,
    past: Sequence[Past],
    policy: RestartSpec,
    *,
    progressed: bool,
    slurm_restarts: bool = False,
    local: bool = False,
) -> Decision:
    """What follows an attempt. `slurm_restarts`: Slurm has already put the job back into the queue."""
    refused = _refusal(verdict.cause, exit_code, policy, local=local)
    stop = Action.WITHDRAW if slurm_restarts else Action.STOP
    if refused is not None:
        return Decision(action=stop, reason=refused)
    budget = policy.budget(verdict.cause.value)
    used = 0 if progressed else spent(verdict.cause, past)
    if budget == 0 or (not progressed and used >= budget):
        return Decision(action=stop, reason=_exhausted(verdict.cause, budget), budget=budget, left=0)
    left = budget if progressed else budget - used - 1
    why = "it wrote a checkpoint, so this restart is free" if progressed else f"restart {used + 1} of {budget} without"
    reason = why if progressed else f"{why} a new checkpoint"
    action = Action.LEAVE if slurm_restarts else Action(policy.how)
    return Decision(action=action, reason=reason, budget=budget, left=left)


def spent(cause: Cause, past: Sequence[Past]) -> int:
    """Restarts for `cause` since the run last wrote a checkpoint."""
    count = 0
    for earlier in reversed(past):
        if earlier.progressed:
            break
        count += earlier.goes_on and earlier.cause is cause
    return count


def _refusal(cause: Cause, exit_code: int, policy: RestartSpec, *, local: bool) -> str | None:
    """Why nothing may start by itself, whatever the budgets."""
    if cause in _FINAL:
        return _FINAL[cause]
    if exit_code == ExitCode.NEVER_REQUEUE:
        return f"exit code {exit_code} asks never to be started again"
    if exit_code == ExitCode.CONFLICT:
        return "another attempt holds the run"
    if policy.how == "none":
        return "restart.how is none; `launcher resubmit` goes on"
    if local and cause is Cause.TIMEOUT:
        return "a local run ends with its time limit; `launcher resubmit` goes on"
    return None


def _exhausted(cause: Cause, budget: int) -> str:
    remedy = f" Try {_REMEDY[cause]}." if cause in _REMEDY else ""
    spent_all = f"all {budget} restarts without a new checkpoint are used up" if budget else "it is not restarted"
    return f"{spent_all} (restart.{cause.value}: {budget}).{remedy} `launcher resubmit` goes on"
