"""`python -m launcher.attempts.attempt begin|end RUN`: the first and the last thing a batch script does.

`begin` takes the lease of the run, and judges the attempt before it if that one did not record how it ended (its node
died). `end` judges this attempt, releases the lease, and prints one line for the shell: what to do now, and the nodes
to avoid. The shell asks the scheduler and passes its answers on as text: most containers lack the scheduler's commands.

All of it is in events.jsonl (`restart_decided`, `lease_taken_over`, `lease_refused`) for `status --why`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launcher.attempts.cause import Cause, Diagnosis, classify
from launcher.attempts.evidence import gather
from launcher.attempts.in_place import Allocation, bad_nodes, next_nodes, with_silent_nodes
from launcher.attempts.race_entry import has_lost, wins
from launcher.attempts.restart import LEAST_STEPS, Action, Decision, Past, decide
from launcher.contract.errors import LauncherError, RunStateError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import AttemptName
from launcher.contract.job_state import JobState
from launcher.contract.lease import Owner, release, take
from launcher.contract.prometheus_file import Standing, write_prometheus
from launcher.contract.records import is_number, read_events, read_metrics
from launcher.contract.rundir import RunPaths, append_event, checkpoint_step
from launcher.contract.spec import read_resolved
from launcher.scheduler.base import JobView, Scheduler
from launcher.scheduler.factory import scheduler_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and run."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.attempts.attempt", description="Begin or end an attempt of a run."
    )
    commands = parser.add_subparsers(required=True)
    for name, run, about in (
        ("begin", begin, "take the run's lease"),
        ("end", end, "decide what follows, and release the lease"),
    ):
        command = commands.add_parser(name, help=about, description=about)
        command.add_argument("run", type=Path, help="the run directory")
        command.add_argument("--attempt", required=True, help="name of this attempt")
        command.add_argument("--job-id", required=True, help="job of this attempt")
        command.add_argument("--pid", type=int, required=True, help="process of the batch script")
        command.add_argument("--cluster", default="", help="the Slurm cluster of that job")
        command.set_defaults(run_command=run)
        if name == "begin":
            command.add_argument("--holder-state", default="", help="state of the job that holds the lease")
            command.add_argument("--candidate", default="", help="of a race, the one that this job is for")
            command.add_argument("--nodes-down", default="", help="nodes of the attempt before this one that are down")
        else:
            command.add_argument("--exit-code", type=int, required=True, help="how the attempt ended")
            command.add_argument("--job", default="", help="what the scheduler says of this job")
            command.add_argument("--nodes", default="", help="all nodes of the job, in its order")
            command.add_argument("--nodes-used", default="", help="those that ranks ran on")
            command.add_argument("--nodes-usable", default="", help="those on which ranks may start again")
            command.add_argument("--nodes-draining", default="", help="those that the site takes out of service")
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
    """Take the lease. Return exit code 4 where another attempt holds it, 93 where the policy forbids this start."""
    paths = RunPaths(options.run.absolute())
    owner = _owner(options)
    if has_lost(paths, options.candidate, options.attempt):
        return int(ExitCode.CONFLICT)
    try:
        void = take(paths, owner, _holder_state(paths, options.holder_state))
    except RunStateError as refusal:
        append_event(paths, "lease_refused", attempt=options.attempt, reason=str(refusal))
        raise
    if void is not None:
        append_event(paths, "lease_taken_over", attempt=options.attempt, holder=void)
        print(f"took over the run from {void}", file=sys.stderr)
    if options.candidate and not wins(paths, options.candidate, options.attempt, options.job_id):
        release(paths, owner)
        return int(ExitCode.CONFLICT)
    decision = _judge_predecessor(paths, options)
    if decision is not None and not decision.action.goes_on:
        print(f"error: not started again: {decision.reason}", file=sys.stderr)
        release(paths, owner)
        return int(ExitCode.NEVER_REQUEUE)
    _tell_dashboards(paths, Standing(attempt=options.attempt, active=True))
    return int(ExitCode.OK)


def end(options: argparse.Namespace) -> int:
    """Decide what follows and print it for the shell."""
    paths = RunPaths(options.run.absolute())
    scheduler = _scheduler(paths)
    job = scheduler.read_view(options.job)
    events = read_events(paths)
    evidence = gather(paths, scheduler, options.attempt, options.exit_code, job, options.job_id, events)
    allocation = _allocation(options)
    diagnosis = with_silent_nodes(classify(evidence), allocation)
    nodes = _nodes_in_place(paths, options.attempt, diagnosis, allocation, events)
    requeued = job is not None and job.restarts > (AttemptName(options.attempt).restart or 0)
    decision = _decide(paths, options.attempt, options.exit_code, diagnosis, events, requeued=requeued, nodes=nodes)
    print(f"{diagnosis.cause.value} ({diagnosis.detail}): {decision.action.value}; {decision.reason}", file=sys.stderr)
    _tell_dashboards(paths, Standing(attempt=options.attempt, active=False, exit_code=options.exit_code))
    if decision.action is Action.IN_PLACE:
        print(f"{decision.action.value} {_hand_over(paths, options)} {','.join(nodes or ())}".rstrip())
        return int(ExitCode.OK)
    release(paths, _owner(options))
    print(f"{decision.action.value} {_avoided(diagnosis, job)}".rstrip())
    return int(ExitCode.OK)


def _tell_dashboards(paths: RunPaths, standing: Standing) -> None:
    """Bring the file of metrics.prometheus up to date, if the run has one and it can be written."""
    try:
        write_prometheus(read_resolved(paths.config), paths, standing)
    except OSError as error:
        print(f"metrics.prometheus: {error}", file=sys.stderr)


def _allocation(options: argparse.Namespace) -> Allocation:
    texts = (options.nodes, options.nodes_used, options.nodes_usable, options.nodes_draining)
    hosts, used, usable, draining = (tuple(filter(None, text.split(","))) for text in texts)
    return Allocation(hosts=hosts, used=used, usable=usable, draining=draining)


def _nodes_in_place(
    paths: RunPaths,
    attempt: str,
    diagnosis: Diagnosis,
    allocation: Allocation,
    events: Sequence[Mapping[str, Any]],
) -> tuple[str, ...] | None:
    """Return the nodes for a restart in place, or None where it cannot be. A scheduler without nodes needs none."""
    spec = read_resolved(paths.config)
    if not scheduler_of(spec.cluster.scheduler).capabilities.allocates_nodes:
        return ()
    avoid = bad_nodes(events, attempt) | set(diagnosis.nodes)
    return next_nodes(allocation, spec.resources.nodes, avoid)


def _hand_over(paths: RunPaths, options: argparse.Namespace) -> str:
    """Give the lease to the attempt that follows in place, and return its name, or `-` where only its script knows it.

    From here on the ranks of this attempt cannot write, wherever one may still be alive.
    """
    owner = _owner(options)
    following = AttemptName(options.attempt).next_in_place
    if following is None:
        release(paths, owner)
        return "-"
    take(paths, dataclasses.replace(owner, attempt=following))
    return following


def _owner(options: argparse.Namespace) -> Owner:
    return Owner.of_process(options.attempt, options.job_id, options.pid, options.cluster)


def _scheduler(paths: RunPaths) -> Scheduler:
    return scheduler_of(read_resolved(paths.config).cluster.scheduler)


def _holder_state(paths: RunPaths, text: str) -> JobState:
    return _scheduler(paths).read_state(text) if text else JobState.UNKNOWN


def _avoided(diagnosis: Diagnosis, job: JobView | None) -> str:
    """Return all nodes to avoid from now on as a host list, or an empty string where there is no new one."""
    if not diagnosis.nodes:
        return ""
    return ",".join([*([job.excluded] if job and job.excluded else []), *diagnosis.nodes])


def _judge_predecessor(paths: RunPaths, options: argparse.Namespace) -> Decision | None:
    """Decide on the attempt before this one if it belongs to the same job and did not record how it ended."""
    events = read_events(paths)
    started = [event for event in events if event["event"] == "attempt_started" and "attempt" in event]
    last = started[-1] if started else {}
    if last.get("job_id") != options.job_id or last.get("attempt") == options.attempt:
        return None
    name = str(last["attempt"])
    if any(event["event"] == "restart_decided" and event.get("attempt") == name for event in events):
        return None
    if options.nodes_down:
        diagnosis = Diagnosis(cause=Cause.NODE_FAILURE, detail=f"{options.nodes_down} went down while it ran")
    else:
        detail = "the scheduler ended it without notice and started the job again"
        diagnosis = Diagnosis(cause=Cause.PREEMPTED, detail=detail)
    return _decide(paths, name, int(ExitCode.FAILURE), diagnosis, events, requeued=True)


def _decide(
    paths: RunPaths,
    attempt: str,
    exit_code: int,
    diagnosis: Diagnosis,
    events: Sequence[Mapping[str, Any]],
    *,
    requeued: bool,
    nodes: tuple[str, ...] | None = None,
) -> Decision:
    """Apply the run's policy, record the decision and return it. `nodes` are those for a restart in place."""
    spec = read_resolved(paths.config)
    decided = _since_submitted(events)
    step = max(map(checkpoint_step, paths.complete_checkpoints()), default=0)
    before = next((event["step"] for event in reversed(events) if _is_decision(event)), 0)
    progressed = step >= before + LEAST_STEPS
    decision = decide(
        diagnosis,
        exit_code,
        [_past(event) for event in decided],
        spec.restart,
        progressed=progressed,
        requeued=requeued,
        requeues=scheduler_of(spec.cluster.scheduler).capabilities.requeues,
        in_place=nodes is not None,
    )
    append_event(
        paths,
        "restart_decided",
        attempt=attempt,
        exit_code=exit_code,
        cause=diagnosis.cause.value,
        detail=diagnosis.detail,
        decision=decision.action.value,
        reason=decision.reason,
        budget=decision.budget,
        budget_left=decision.left,
        step=step,
        progressed=progressed,
        **({"avoid": list(diagnosis.nodes)} if diagnosis.nodes else {}),
        **(_place(paths, nodes or ()) if decision.action is Action.IN_PLACE else {}),
    )
    return decision


def _place(paths: RunPaths, nodes: Sequence[str]) -> dict[str, object]:
    """Return where ranks start again, and how far they had come: what the restart costs is counted from there."""
    reached = max((line["step"] for line in read_metrics(paths)), default=0)
    try:
        reached_at = paths.metrics.stat().st_mtime
    except FileNotFoundError:
        return {"nodes": list(nodes)}
    return {"nodes": list(nodes), "reached": reached, "reached_at": reached_at}


def _is_decision(event: Mapping[str, Any]) -> bool:
    """Return whether an event is a decision with all that a later one looks at."""
    known = event.get("cause") in list(Cause) and event.get("decision") in list(Action)
    return event.get("event") == "restart_decided" and known and is_number(event.get("step"))


def _past(event: Mapping[str, Any]) -> Past:
    action = Action(event["decision"])
    return Past(cause=Cause(event["cause"]), goes_on=action.goes_on, progressed=bool(event.get("progressed")))


def _since_submitted(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the decisions since a person last submitted the run, which restores all budgets."""
    decisions: list[Mapping[str, Any]] = []
    for event in events:
        if event.get("event") == "submitted" and not event.get("by"):
            decisions = []
        elif _is_decision(event):
            decisions.append(event)
    return decisions


if __name__ == "__main__":
    sys.exit(main())
