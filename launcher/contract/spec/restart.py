"""restart: when a run goes on by itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from launcher.contract.spec.rules import Above, AtLeast


@dataclass(frozen=True, kw_only=True, slots=True)
class RestartSpec:
    """When a run restarts by itself.

    Each count is a budget: how often in a row the run restarts for this cause without progress, 0 for never. Progress
    is a new checkpoint, two steps or more after the one before; a restart after it is free. Errors in code, data or
    settings are never retried.
    """

    how: Literal["requeue", "in_place", "resubmit", "none"] = "requeue"
    """requeue: the same job starts again (where a site forbids that, a new job); in_place: the ranks start again within
    the job, without a wait in the queue, where its nodes and resources.spare_nodes suffice, and otherwise as with
    requeue; resubmit: always a new job; none: the user decides."""
    node_seconds: Annotated[float, Above(0)] = 20.0
    """in_place: how long a node may take to answer after a fault before the restart leaves it out."""
    preempted: Annotated[int, AtLeast(0)] = 10
    """Ended for another job."""
    timeout: Annotated[int, AtLeast(0)] = 3
    """Reached its time limit."""
    node_failure: Annotated[int, AtLeast(0)] = 3
    """A node was lost."""
    communication: Annotated[int, AtLeast(0)] = 3
    """NCCL, gloo or the rendezvous failed."""
    hang: Annotated[int, AtLeast(0)] = 2
    """No rank finished a step for too long."""
    bad_node: Annotated[int, AtLeast(0)] = 3
    """A node failed its preflight; the next attempt excludes it."""
    out_of_memory: Annotated[int, AtLeast(0)] = 1
    """Of the GPU or of the host."""
    disk_full: Annotated[int, AtLeast(0)] = 0
    """No space for a checkpoint."""
    unknown: Annotated[int, AtLeast(0)] = 2
    """Anything else, e.g. a rank that was killed."""

    def budget(self, cause: str) -> int:
        """Return how many restarts in a row without progress are allowed for `cause`, the name of one of the fields."""
        value: int = getattr(self, cause)
        return value
