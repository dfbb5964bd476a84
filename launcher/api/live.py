"""stacks, usage: what the ranks of a run are doing now, and what runs have used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.api.runs import Run, selected
from launcher.contract.rundir import default_run_root
from launcher.runs.find import find_run
from launcher.runs.usage import Sum, Use, by_key, total, uses
from launcher.views.stacks import Stacks, gather

if TYPE_CHECKING:
    from launcher.runs.selection import Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """The GPU hours of runs."""

    by: str
    """What they are summed by: `run`, `user`, `group`, `state`, `cause` or a key of the config."""
    sums: tuple[Sum, ...]
    """A sum for each value of it, the largest first."""
    total: Sum
    """All of them together."""
    attempts: tuple[Use, ...]
    """Every attempt: one start of a job."""
    unreadable: tuple[str, ...]
    """Runs that were left out, each with what is wrong with it."""


def stacks(run: Run, *, root: Path | None = None) -> Stacks:
    """Return where every rank of a running run stands. No rank is disturbed. RunStateError where no rank runs."""
    from launcher.submission.beside import ask_ranks, live_attempt

    live = live_attempt(find_run(str(run), root or default_run_root()))
    return gather(live.paths.name, live.name, len(live.hosts), live.ranks, ask_ranks(live))


def usage(
    runs: Sequence[Run] = (), *, root: Path | None = None, select: Selection | None = None, by: str = "run"
) -> Usage:
    """Return the GPU hours of runs, from the scheduler's accounting, or where there is none from the runs' events."""
    chosen = selected(runs, root, select)
    found, unreadable = uses(chosen)
    return Usage(
        by=by,
        sums=tuple(by_key(found, by, chosen)),
        total=total(found),
        attempts=tuple(found),
        unreadable=tuple(unreadable),
    )
