"""`status --why`: how each attempt of a run ended, what was decided then, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launcher.contract.records import read_events
from launcher.contract.rundir import JsonObject, RunPaths
from launcher.runs.snapshot import meaning_of
from launcher.views.text import local_time
from launcher.views.timeline import first_step

_NAMED = 8
"""Number of nodes that a line names; the event has all."""

_TOLD: dict[str, Callable[[JsonObject], str]] = {
    "submitted": lambda event: (
        f"submitted as {event['scheduler']} job {event['job_id']}"
        + (" by the run itself" if event.get("by") else "")
        + (f" to {event['candidate']}, if it is the first to start" if event.get("candidate") else "")
    ),
    "attempt_started": lambda event: f"attempt {event['attempt']} started on {event.get('nodes') or event['host']}",
    "training_started": lambda event: f"training began after step {event['step']} of {event['max_steps']}",
    "restarted_in_place": lambda event: f"the same job trains on{_cost(event)}",
    "copy_used": lambda event: f"goes on from the copy of step {event['step']} in the nodes' memory",
    "copy_not_used": lambda event: f"goes on from no copy in the nodes' memory: {event['reason']}",
    "copy_failed": lambda event: f"no copy of step {event['step']} was made: {event['reason']}",
    "copies_off": lambda event: f"makes no copies: {event['reason']}",
    "first_step": lambda event: first_step(event),
    "metrics_lost": lambda event: (
        "metrics.jsonl has no line for steps " + ", ".join(f"{first + 1} to {last}" for first, last in event["steps"])
    ),
    "stop_requested": lambda event: f"stopped after step {event['step']}: {_stop(event)}",
    "hang_detected": lambda event: f"no rank finished a step in time; behind: {_behind(event)}",
    "preflight_failed": lambda event: (
        "preflight failed on " + ", ".join(str(node["host"]) for node in event.get("nodes", []))
    ),
    "lease_taken_over": lambda event: f"took over the lease of {event['holder']}",
    "race_won": lambda event: f"job {event['job_id']}, on {event['candidate']}, was the first to start and has the run",
    "lease_refused": lambda event: f"attempt {event['attempt']} refused to start: {event['reason']}",
    "cancelled": lambda event: f"job {event['job_id']} was cancelled by `launcher cancel`",
    "training_finished": lambda event: f"training finished after step {event['step']}",
    "exported": lambda event: "exported",
    "attempt_ended": lambda event: _end(event),
    "restart_decided": lambda event: _decision(event),
}


def explain(paths: RunPaths) -> str:
    """Return the run's history: one line, with its local time, for every event that matters."""
    events = read_events(paths)
    decided = {event.get("attempt") for event in events if event.get("event") == "restart_decided"}
    lines = [f"run {paths.name}"]
    for event in events:
        if event.get("event") == "attempt_ended" and event.get("attempt") in decided:
            continue  # its decision, which follows, says the same and more
        tell = _TOLD.get(str(event.get("event")))
        if tell is not None:
            lines.append(f"{_clock(event)}  {_safely(tell, event)}")
    return "\n".join(lines)


def decisions(paths: RunPaths) -> list[JsonObject]:
    """Return the decisions alone, for --json."""
    return [event for event in read_events(paths) if event.get("event") == "restart_decided"]


def _decision(event: JsonObject) -> str:
    budget = "" if event.get("budget") is None else f" [{event['budget_left']} of {event['budget']} restarts left]"
    avoid = f", avoiding {', '.join(event['avoid'])}" if event.get("avoid") else ""
    cause = str(event["cause"]).replace("_", " ")
    nodes = f" on {_some(event['nodes'])}" if event.get("nodes") else ""
    lines = (
        f"attempt {event['attempt']} ended with exit code {event['exit_code']}",
        f"cause: {cause} ({event['detail']})",
        f"decision: {str(event['decision']).replace('_', ' ')}{nodes}{avoid}: {event['reason']}{budget}",
    )
    return f"\n{'':21}".join(lines)


def _some(nodes: Sequence[str]) -> str:
    """Return the first names of a list that may be as long as the job is large."""
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return ", ".join(nodes[:_NAMED]) + more


def _cost(event: JsonObject) -> str:
    """Return what a restart in place has cost, where that is known."""
    if "steps_lost" not in event:
        return ""
    return f": {event['steps_lost']} steps to do again, {float(event['seconds_lost']):.0f} s without training"


def _end(event: JsonObject) -> str:
    """Tell of an end that no decision follows: the attempt did not hold the run yet, or a person began it."""
    cause = f"\n{'':21}cause: {event['detail']}" if event.get("detail") else ""
    return (
        f"attempt {event['attempt']} ended with exit code {event['exit_code']}{meaning_of(event['exit_code'])}{cause}"
    )


def _stop(event: JsonObject) -> str:
    if event.get("deadline"):
        return "the end of the job's time is near"
    return f"asked by {event['signal']}" if event.get("signal") else "another rank was asked"


def _behind(event: JsonObject) -> str:
    ranks = [f"rank {place['rank']} on {place['host']}" for place in event.get("behind", [])]
    return ", ".join(ranks) if event.get("told_apart") else "nobody in particular"


def _clock(event: JsonObject) -> str:
    return local_time(float(event.get("time", 0)))


def _safely(tell: Callable[[JsonObject], str], event: JsonObject) -> str:
    try:
        return tell(event)
    except (KeyError, TypeError, ValueError, AttributeError):  # written by another version, or damaged
        return str(event.get("event"))
