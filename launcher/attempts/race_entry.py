"""What a job does that is one of several of its run (`submit --first-of`): it has won, or leaves the run alone."""

from __future__ import annotations

import sys

from launcher.contract import race
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths, append_event


def has_lost(paths: RunPaths, candidate: str, attempt: str) -> bool:
    """Return whether another candidate has won. Then even the lease is not this job's to take."""
    won = race.winner(paths) if candidate else None
    if won in (None, candidate):
        return False
    reason = f"{won} was the first to start, and this job is for {candidate}"
    append_event(paths, "lease_refused", attempt=attempt, reason=reason)
    print(f"error: {reason}", file=sys.stderr)
    return True


def wins(paths: RunPaths, candidate: str, attempt: str, job_id: str) -> bool:
    """Decide the race, with the lease in hand, and return whether this job has won it. Print the jobs that lost."""
    if race.decide(paths, candidate, job_id) != candidate:
        return not has_lost(paths, candidate, attempt)
    race.install(paths, candidate)
    events = read_events(paths)
    if not any(event["event"] == "race_won" for event in events):
        append_event(paths, "race_won", attempt=attempt, job_id=job_id, candidate=candidate)
    for name, event in race.entries(events).items():
        if name != candidate:
            print(f"rival {event['job_id']} {event.get('cluster', '')}".rstrip())
    return True
