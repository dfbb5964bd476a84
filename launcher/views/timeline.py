"""What a report says of time: the attempts as bars, and the events in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launcher.contract.exit_codes import ExitCode
from launcher.contract.records import is_number
from launcher.contract.rundir import JsonObject
from launcher.views.text import duration, local_time

_DECISIVE = ("restart", "requeue", "ended", "stop", "cancel", "bad", "rewound", "lease")
"""Parts of the names of events that tell of an end or of a new start."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Bar:
    """An attempt on the timeline. Left and width are percents of the time from submission to the last event."""

    attempt: str
    host: str
    began: str
    lasted: str
    steps: str
    ended: str
    good: bool | None
    """Whether it ended well, if an end is recorded."""
    left: float
    width: float


def bars(events: Sequence[JsonObject], created_at: float) -> list[Bar]:
    """Return one bar for every attempt that has started."""
    last = max([created_at, *(event["time"] for event in events)])
    attempts = dict.fromkeys(str(event.get("attempt")) for event in events if event["event"] == "attempt_started")
    return [
        _bar(attempt, [event for event in events if str(event.get("attempt")) == attempt], created_at, last)
        for attempt in attempts
    ]


def _bar(attempt: str, events: Sequence[JsonObject], created_at: float, last: float) -> Bar:
    end = next((event for event in reversed(events) if event.get("event") == "attempt_ended"), None)
    began, until = events[0]["time"], (end or events[-1])["time"]
    code = end.get("exit_code") if end else None
    steps = [event["step"] for event in events if is_number(event.get("step"))]
    span = max(last - created_at, 1.0)
    return Bar(
        attempt=attempt,
        host=str(events[0].get("host", "")),
        began=local_time(began),
        lasted=duration(until - began),
        steps=f"{min(steps):,} to {max(steps):,}" if steps else "-",
        ended="no end recorded" if end is None else f"exit code {code}",
        good=None if end is None else code in (ExitCode.OK, ExitCode.REQUEUE),
        left=round(100 * max(0.0, began - created_at) / span, 2),
        width=round(max(0.6, 100 * (until - began) / span), 2),  # a short attempt stays visible
    )


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
