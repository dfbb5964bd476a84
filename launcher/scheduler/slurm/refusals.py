"""What to set where sbatch refuses a job: the config key, and the values that Slurm itself says are valid."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from launcher.contract.errors import SchedulerError
from launcher.scheduler.slurm import commands


def advice(said: str) -> str:
    """Return a line to put behind what sbatch said, or an empty text where the words are not known."""
    for words, key, known in _REFUSALS:
        if words in said.lower():
            valid = _values(known)
            return f"\nset {key}" + (f" to one of {', '.join(valid)}" if valid else "")
    return ""


def _values(known: Callable[[], Sequence[str]] | None) -> list[str]:
    """Return the values that Slurm names, none where it does not answer."""
    if known is not None:
        with contextlib.suppress(SchedulerError):
            return sorted(set(known()))
    return []


def _partitions() -> list[str]:
    return [partition.name for partition in commands.partitions()]


_REFUSALS: tuple[tuple[str, str, Callable[[], Sequence[str]] | None], ...] = (
    ("invalid account", "resources.account", commands.own_accounts),
    ("invalid partition", "resources.partition", _partitions),
    ("invalid qos", "resources.qos", None),
    ("time limit", "resources.time", None),
    ("invalid constraint", "resources.constraint", None),
    ("reservation", "resources.reservation", None),
)
"""What sbatch says in lower case, the key, and who knows its values; the first that fits counts."""
