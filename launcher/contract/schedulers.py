"""What each scheduler can do, as values: for rules that must not call a scheduler.

`launcher.scheduler.factory` has the implementations. An entry here makes the scheduler's name valid in cluster files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SchedulerName = Literal["slurm", "local"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities:
    """What a scheduler can do; each field is a question that some rule asks."""

    allocates_nodes: bool = False
    """It gives a job nodes of a cluster: several at once, others next time, and none that it is told to avoid."""
    requeues: bool = False
    """It may stop a job and start it again, with its whole time limit; so an attempt's last word is not the job's."""
    forgets_jobs: bool = False
    """It drops jobs some time after they have ended: a job that it does not know is not at work."""
    dependencies: bool = False
    """A job can wait for another one."""
    arrays: bool = False
    """One submission can make many jobs that differ by a number."""
    inherits_environment: bool = False
    """A job has the environment of the shell that submits it, so secrets need no file."""
    restarts_in_place: bool = False
    """Its template can start the ranks of a job again while the job keeps its nodes."""
    srun: bool = False
    """Ranks are started by srun, whose plugins (pyxis) are at hand."""


CAPABILITIES: dict[SchedulerName, Capabilities] = {
    "slurm": Capabilities(
        allocates_nodes=True,
        requeues=True,
        forgets_jobs=True,
        dependencies=True,
        arrays=True,
        restarts_in_place=True,
        srun=True,
    ),
    "local": Capabilities(inherits_environment=True, restarts_in_place=True),
}


def scheduler_name(text: object) -> SchedulerName:
    """Return `text` as the name of a scheduler. Raise ValueError where it is none of ours."""
    for name in CAPABILITIES:
        if name == text:
            return name
    raise ValueError(f"{text!r} is no scheduler; known: {', '.join(CAPABILITIES)}")
