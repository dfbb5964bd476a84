"""What a report says of time: the attempts as bars, and the events in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launcher.contract.exit_codes import ExitCode
from launcher.contract.records import is_number
from launcher.contract.rundir import JsonObject
from launcher.views.text import duration, local_time

_DECISIVE = ("restart", "requeue", "ended", "stop", "cancel", "bad", "rewound", "lease")
"""Parts of the names of events that tell of an end or of a new start."""
_TRAINED = ("training_started", "checkpoint_saved", "bad_step", "stop_requested", "stopped_early", "training_finished")
"""Events whose step was reached by training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An attempt on the timeline. Left and width are percents of the time from submission to the last event."""

    attempt: str
    nodes: str
    """Where it ran, as a host list."""
    began: str
    lasted: str
    steps: str
    ended: str
    why: str
    """The cause of its end and what was decided."""
    good: bool | None
    """Whether it ended well, if an end is recorded."""
    left: float
    width: float


def bars(events: Sequence[JsonObject], created_at: float, newest_step: int | None = None) -> list[Bar]:
    """Return one bar for every attempt that has started. `newest_step` is the last one that was logged, by the last."""
    last = max([created_at, *(event["time"] for event in events)])
    attempts = dict.fromkeys(str(event.get("attempt")) for event in events if event["event"] == "attempt_started")
    newest = dict.fromkeys(list(attempts)[-1:], newest_step)
    return [
        _bar(attempt, [event for event in events if str(event.get("attempt")) == attempt], created_at, last, newest)
        for attempt in attempts
    ]


def _bar(
    attempt: str,
    events: Sequence[JsonObject],
    created_at: float,
    last: float,
    newest: Mapping[str, int | None],
) -> Bar:
    end = next((event for event in reversed(events) if event.get("event") == "attempt_ended"), None)
    began, until = events[0]["time"], (end or events[-1])["time"]
    code = end.get("exit_code") if end else None
    start = next((event for event in events if event.get("event") == "attempt_started"), events[0])
    span = max(last - created_at, 1.0)
    return Bar(
        attempt=attempt,
        nodes=str(start.get("nodes") or start.get("host") or ""),
        began=local_time(began),
        lasted=duration(until - began),
        steps=_steps(events, newest.get(attempt)),
        ended="no end recorded" if end is None else f"exit code {code}",
        why=_why(events, end),
        good=None if end is None else code in (ExitCode.OK, ExitCode.REQUEUE),
        left=round(100 * max(0.0, began - created_at) / span, 2),
        width=round(max(0.6, 100 * (until - began) / span), 2),  # a short attempt stays visible
    )


def _steps(events: Sequence[JsonObject], newest: int | None) -> str:
    """Return from where to where an attempt trained. An export names a step as well, of the checkpoint it took."""
    told = [event["step"] for event in events if event.get("event") in _TRAINED and is_number(event.get("step"))]
    begun = next((event["step"] for event in events if event.get("event") == "training_started"), None)
    if not told or not is_number(begun):
        return "-"
    return f"{begun:,} to {max([*told, *([newest] if newest is not None else [])]):,}"


def _why(events: Sequence[JsonObject], end: JsonObject | None) -> str:
    decided = next((event for event in reversed(events) if event.get("event") == "restart_decided"), None)
    if decided is None:
        return str((end or {}).get("detail", ""))
    cause, detail = str(decided.get("cause", "")).replace("_", " "), decided.get("detail")
    return f"{cause}{f': {detail}' if detail else ''} → {str(decided.get('decision', '?')).replace('_', ' ')}"


def first_steps(events: Sequence[JsonObject]) -> list[tuple[str, str]]:
    """Return each attempt that has come to its first step, with what `first_step` says of it."""
    return [
        (str(event.get("attempt")), first_step(event))
        for event in events
        if event["event"] == "first_step" and isinstance(event.get("phases"), dict) and is_number(event.get("seconds"))
    ]


def first_step(event: JsonObject) -> str:
    """Return what a `first_step` event says: how long the step took to come, and which phases that was made of."""
    parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in event["phases"].items())
    warm_up = event.get("warm_up")
    more = f" ({warm_up:.1f} more than the second)" if is_number(warm_up) else ""
    return f"first step done {event['seconds']:.1f} s after submission: {parts}{more}"


def resumed_at(events: Sequence[JsonObject]) -> list[float]:
    """Return the steps after which a later attempt resumed training."""
    begun = [event.get("step") for event in events if event["event"] == "training_started"]
    return [float(step) for step in begun if is_number(step) and step]


def event_row(event: JsonObject) -> tuple[str, str, str, bool]:
    """Return an event's time, name and fields, and whether it tells of an end or of a new start."""
    name = str(event.get("event", "?"))
    fields = ", ".join(f"{key} {value}" for key, value in event.items() if key not in ("time", "event"))
    decisive = any(part in name for part in _DECISIVE)
    return local_time(event.get("time", 0)), name.replace("_", " "), fields, decisive
