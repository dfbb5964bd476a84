"""The one place where a scheduler is chosen by its name."""

from __future__ import annotations

from collections.abc import Callable

from launcher.contract.schedulers import SchedulerName
from launcher.scheduler.base import Scheduler
from launcher.scheduler.local import Local
from launcher.scheduler.slurm.scheduler import Slurm

_SCHEDULERS: dict[SchedulerName, Callable[[], Scheduler]] = {"slurm": Slurm, "local": Local}


def scheduler_of(name: SchedulerName) -> Scheduler:
    """Return the scheduler that cluster files and manifests call `name`."""
    return _SCHEDULERS[name]()
