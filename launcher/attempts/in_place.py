"""Restarts in place: which nodes of a job its ranks start on again, and what the restart costs. Pure.

The batch script looks at the nodes once the ranks have ended, and passes on what it saw (templates/slurm.sh.j2). A node
is usable if it answered in time and no process of the ranks is left on it. What does not answer is not used again by
this start, and whatever may still run there is kept from writing by the lease, which by then has another name in it.
docs/explanation/restart-in-place.md has the reasons.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from launcher.attempts.cause import Cause, Diagnosis
from launcher.contract.job import AttemptName

_BY_A_LOST_NODE = (Cause.COMMUNICATION, Cause.HANG, Cause.NODE_FAILURE, Cause.UNKNOWN)
"""What the other ranks make of a node that is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Allocation:
    """The nodes of a job after its ranks have ended."""

    hosts: tuple[str, ...] = ()
    """All of them, in the scheduler's order; none where nobody could look."""
    used: tuple[str, ...] = ()
    """Those that ranks ran on."""
    usable: tuple[str, ...] = ()
    """Those that answered and are free of the ranks' processes."""
    draining: tuple[str, ...] = ()
    """Those that the site takes out of service once their jobs have ended, maybe because they are bad."""

    @property
    def silent(self) -> tuple[str, ...]:
        """The nodes that ranks ran on and that are not usable. None where no node is: that is not a node's fault."""
        return tuple(host for host in self.used if host not in self.usable) if self.usable else ()


def next_nodes(allocation: Allocation, wanted: int, avoid: Collection[str]) -> tuple[str, ...] | None:
    """Return the nodes to start `wanted` nodes' ranks on, in the scheduler's order, or None where they do not suffice.

    Draining nodes come last. Of the others, those that ranks ran on come before spare ones: their caches are warm.
    """
    good = [host for host in allocation.hosts if host in allocation.usable and host not in avoid]
    # Of equal worth, nodes stay in the scheduler's order: sorting is stable.
    by_worth = sorted(good, key=lambda host: (host in allocation.draining, host not in allocation.used))
    chosen = by_worth[:wanted]
    return tuple(host for host in good if host in chosen) if len(chosen) == wanted else None


def with_silent_nodes(diagnosis: Diagnosis, allocation: Allocation) -> Diagnosis:
    """Return the diagnosis, or that of a lost node where one gives no answer and the cause found may follow from it.

    The node is not to be avoided for ever: it may come back, and a requeued job on a small cluster would never start.
    """
    if not allocation.silent or diagnosis.cause not in _BY_A_LOST_NODE:
        return diagnosis
    detail = f"{', '.join(allocation.silent)} gives no answer; {diagnosis.detail}"
    return dataclasses.replace(diagnosis, cause=Cause.NODE_FAILURE, detail=detail)


def bad_nodes(events: Sequence[Mapping[str, object]], attempt: str) -> set[str]:
    """Return the nodes that this start of the job has found bad: by an error or a preflight, or by two hangs there."""
    own = [event for event in events if _is_of_start(event, AttemptName(attempt))]
    bad = {host for event in own if event.get("cause") == Cause.BAD_NODE for host in _hosts(event.get("avoid"))}
    hung = Counter(host for event in own if event.get("event") == "hang_detected" for host in _hung_on(event))
    return bad | {host for host, times in hung.items() if times > 1}


def _is_of_start(event: Mapping[str, object], attempt: AttemptName) -> bool:
    """Return whether an event is of the start of the job that `attempt` belongs to."""
    other = AttemptName(str(event.get("attempt")))
    return attempt.job is not None and (other.job, other.restart) == (attempt.job, attempt.restart)


def _hung_on(event: Mapping[str, object]) -> set[str]:
    """Return the host of the ranks that hung, or nothing where that is not one host."""
    behind = event.get("behind")
    places = behind if event.get("told_apart") and isinstance(behind, list) else []
    hosts = {str(place.get("host")) for place in places if isinstance(place, dict)}
    return hosts if len(hosts) == 1 else set()


def _hosts(value: object) -> list[str]:
    return [str(host) for host in value] if isinstance(value, list) else []
