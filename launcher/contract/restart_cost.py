"""What a restart in place has cost: the steps to do again, and the time without training."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.records import is_number
from launcher.contract.rundir import JsonObject

IN_PLACE = "in_place"
"""The decision (launcher/attempts/restart.py) that ranks start again within their job."""


def restart_cost(events: Sequence[JsonObject], step: int, now: float) -> JsonObject | None:
    """Return the fields of `restarted_in_place` for ranks that go on after `step`, or None where they are no such ones.

    `events` are the run's so far. Where the ranks before had not logged a step, no cost is known, and none is told.
    """
    decided = next((event for event in reversed(events) if event["event"] == "restart_decided"), {})
    told = {event.get("after") for event in events if event["event"] == "restarted_in_place"}
    if decided.get("decision") != IN_PLACE or decided.get("attempt") in told:
        return None
    cost: JsonObject = {"after": decided.get("attempt"), "cause": decided.get("cause"), "step": step}
    reached, reached_at = decided.get("reached"), decided.get("reached_at")
    if is_number(reached) and is_number(reached_at):
        cost["steps_lost"] = max(0, int(reached) - step)
        cost["seconds_lost"] = round(max(0.0, now - reached_at), 1)
    return cost
