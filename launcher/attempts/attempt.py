"""`python -m launcher.attempts.attempt begin|end RUN`: the first and the last thing a batch script does.

`begin` takes the lease of the run, and judges the attempt before it if that left no word of its end (its node died).
`end` judges this attempt, lets go of the lease, and prints one line for the shell: what to do now, and the nodes to
avoid. Slurm is asked by the shell, because its commands are missing in most containers; both get the answers as text.

All of it is in events.jsonl (`restart_decided`, `lease_taken_over`, `lease_refused`) for `status --why`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts.cause import Cause, JobView, Verdict, classify
from launcher.attempts.evidence import gather, parse_job, restart_of
from launcher.attempts.restart import Action, Decision, Past, decide
from launcher.contract.errors import LauncherError, RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.lease import Owner, release, take
from launcher.contract.rundir import RunPaths, append_event, checkpoint_step, read_lines
from launcher.contract.spec import read_resolved


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.attempts.attempt", description="Begin or end an attempt of a run."
    )
    commands = parser.add_subparsers(required=True)
    for name, run, about in (
        ("begin", begin, "take the run's lease"),
        ("end", end, "decide what follows, and let go of the lease"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("run", type=Path, help="the run directory")
        command.add_argument("--attempt", required=True, help="name of this attempt")
        command.add_argument("--job-id", required=True, help="job of this attempt")
        command.add_argument("--pid", type=int, required=True, help="process of the batch script")
        command.set_defaults(run_command=run)
        if name == "begin":
            command.add_argument("--holder-state", default="", help="Slurm's state of the job that holds the lease")
            command.add_argument("--nodes-down", default="", help="nodes of the attempt before this one that are down")
        else:
            command.add_argument("--exit-code", type=int, required=True, help="how the attempt ended")
            command.add_argument("--job", default="", help="the answer of `scontrol show job -o`")
    options = parser.parse_args(arguments)
    try:
        return int(options.run_command(options))
    except LauncherError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(ExitCode.IO_ERROR)


def begin(options: argparse.Namespace) -> int:
    """Take the lease; exit code 4 where another attempt holds it, 93 where the policy forbids this start."""
    paths = RunPaths(options.run.absolute())
    owner = _owner(options)
    try:
        void = take(paths, owner, options.holder_state)
    except RunStateError as refusal:
        append_event(paths, "lease_refused", attempt=options.attempt, reason=str(refusal))
        raise
    if void is not None:
        append_event(paths, "lease_taken_over", attempt=options.attempt, holder=void)
        print(f"took over the run from {void}", file=sys.stderr)
    decision = _judge_predecessor(paths, options)
    if decision is not None and not decision.action.goes_on:
        print(f"error: not started again: {decision.reason}", file=sys.stderr)
        release(paths, owner)
        return int(ExitCode.NEVER_REQUEUE)
    return int(ExitCode.OK)


def end(options: argparse.Namespace) -> int:
    """Decide and print what follows."""
    paths = RunPaths(options.run.absolute())
    job = parse_job(options.job)
    events = list(read_lines(paths.events))
    verdict = classify(gather(paths, options.attempt, options.exit_code, job, options.job_id, events))
    slurm_restarts = job is not None and job.restarts > restart_of(options.attempt)
    decision = _decide(paths, options.attempt, options.exit_code, verdict, events, slurm_restarts=slurm_restarts)
    print(f"{verdict.cause.value} ({verdict.detail}): {decision.action.value}; {decision.reason}", file=sys.stderr)
    release(paths, _owner(options))
    print(f"{decision.action.value} {_avoided(verdict, job)}".rstrip())
    return int(ExitCode.OK)


def _owner(options: argparse.Namespace) -> Owner:
    return Owner.of_process(options.attempt, options.job_id, options.pid)


def _avoided(verdict: Verdict, job: JobView | None) -> str:
    """All nodes to avoid from now on, where there is a new one."""
    if not verdict.nodes:
        return ""
    return ",".join([*([job.excluded] if job and job.excluded else []), *verdict.nodes])


def _judge_predecessor(paths: RunPaths, options: argparse.Namespace) -> Decision | None:
    """Slurm started this job again, and the attempt before could not say how it ended."""
    events = list(read_lines(paths.events))
    started = [event for event in events if event.get("event") == "attempt_started"]
    last = started[-1] if started else {}
    if last.get("job_id") != options.job_id or last.get("attempt") == options.attempt:
        return None
    name = str(last["attempt"])
    if any(event.get("event") == "restart_decided" and event.get("attempt") == name for event in events):
        return None
    if options.nodes_down:
        verdict = Verdict(cause=Cause.NODE_FAILURE, detail=f"{options.nodes_down} went down under it")
    else:
        verdict = Verdict(cause=Cause.PREEMPTED, detail="Slurm ended it without notice and started the job again")
    return _decide(paths, name, int(ExitCode.FAILURE), verdict, events, slurm_restarts=True)


def _decide(
    paths: RunPaths,
    attempt: str,
    exit_code: int,
    verdict: Verdict,
    events: Sequence[Mapping[str, Any]],
    *,
    slurm_restarts: bool,
) -> Decision:
    """Apply the run's policy and record the decision."""
    decided = _since_submitted(events)
    step = max(map(checkpoint_step, paths.complete_checkpoints()), default=0)
    before = next((int(event["step"]) for event in reversed(events) if event.get("event") == "restart_decided"), 0)
    decision = decide(
        verdict,
        exit_code,
        [_past(event) for event in decided],
        read_resolved(paths.config).restart,
        progressed=step > before,
        slurm_restarts=slurm_restarts,
        local=attempt.startswith("local-"),
    )
    append_event(
        paths,
        "restart_decided",
        attempt=attempt,
        exit_code=exit_code,
        cause=verdict.cause.value,
        detail=verdict.detail,
        decision=decision.action.value,
        reason=decision.reason,
        budget=decision.budget,
        budget_left=decision.left,
        step=step,
        progressed=step > before,
        **({"avoid": list(verdict.nodes)} if verdict.nodes else {}),
    )
    return decision


def _past(event: Mapping[str, Any]) -> Past:
    action = Action(event["decision"])
    return Past(cause=Cause(event["cause"]), goes_on=action.goes_on, progressed=bool(event["progressed"]))


def _since_submitted(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Decisions since a person last submitted the run, which makes all budgets whole."""
    found: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("event") == "submitted" and not event.get("by"):
            found = []
        elif event.get("event") == "restart_decided":
            found.append(event)
    return found


if __name__ == "__main__":
    sys.exit(main())
