"""What `launcher top` knows of each run: its state, its curves, its GPUs and its faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launcher.contract.errors import LauncherError
from launcher.contract.job_state import JobState
from launcher.contract.records import read_events
from launcher.contract.rundir import JsonObject, RunPaths
from launcher.contract.spec import read_resolved
from launcher.runs.state import RunStatus
from launcher.views.sparkline import GrowingCurves

_ORDER = (JobState.RUNNING, JobState.COMPLETING, JobState.SUSPENDED, JobState.REQUEUED, JobState.PENDING, JobState.HELD)
"""States in the order in which runs are shown; those that have ended follow, the newest first."""
_QUIET = ("done", "cancelled")


@dataclass(frozen=True, kw_only=True, slots=True)
class TopLine:
    """One run as it is shown."""

    row: RunStatus
    gpus: int
    """GPUs of the run; 0 where it trains on CPUs."""
    losses: Sequence[float] = ()
    """Training loss of each logged step."""
    held_out: Sequence[float] = ()
    """Held-out loss of each evaluation."""
    speeds: Sequence[float] = ()
    """Tokens per second at each logged step."""
    faults: tuple[str, ...] = ()
    """What went wrong, oldest first: a cause and what was decided, a hang, a step that was not applied."""
    restarts: int = 0
    """How often it went on after a fault."""

    @property
    def gpus_now(self) -> int:
        """GPUs that it has now."""
        return self.gpus if self.row.state in (JobState.RUNNING, JobState.COMPLETING, JobState.SUSPENDED) else 0


@dataclass(slots=True)
class _Memory:
    """What is kept of a run between two looks."""

    curves: GrowingCurves
    gpus: int | None = None


@dataclass(slots=True)
class Looks:
    """Looks at runs again and again, and reads of their files only what is new."""

    _known: dict[str, _Memory] = field(default_factory=dict)

    def lines(self, rows: Sequence[RunStatus]) -> list[TopLine]:
        """Return the runs, those at work first, then those that wait, then those that have ended."""
        order = {state: number for number, state in enumerate(_ORDER)}
        numbered = sorted(
            enumerate(rows), key=lambda pair: (order.get(pair[1].state, len(order)), _age(pair[1], pair[0]))
        )
        return [self._line(row) for _, row in numbered]

    def _line(self, row: RunStatus) -> TopLine:
        paths = RunPaths(Path(row.directory))
        memory = self._known.setdefault(row.directory, _Memory(GrowingCurves(paths.metrics)))
        memory.curves.look()
        if memory.gpus is None:
            memory.gpus = _gpus(paths)
        numbers, events = memory.curves.numbers, read_events(paths)
        return TopLine(
            row=row,
            gpus=memory.gpus,
            losses=numbers.get("loss", ()),
            held_out=numbers.get("eval_loss", ()),
            speeds=numbers.get("tokens_per_second", ()),
            faults=tuple(_faults(events)),
            restarts=sum(_is_restart(event) for event in events),
        )


def _age(row: RunStatus, number: int) -> int:
    """Return a number by which runs at work stay in their order, and ended ones are shown newest first."""
    return number if row.state.active else -number


def _gpus(paths: RunPaths) -> int:
    try:
        resources = read_resolved(paths.config).resources
    except LauncherError:
        return 0
    return resources.nodes * resources.gpus_per_node


def _is_restart(event: JsonObject) -> bool:
    return event["event"] == "restart_decided" and event.get("decision") not in (None, "stop", "withdraw")


def _faults(events: Sequence[JsonObject]) -> list[str]:
    told = []
    for event in events:
        if event["event"] == "restart_decided" and event.get("cause") not in (None, *_QUIET):
            told.append(f"{str(event['cause']).replace('_', ' ')}: {event.get('detail', '')} → {event.get('decision')}")
        elif event["event"] == "preflight_failed":
            nodes = event.get("nodes")
            hosts = (
                [str(node.get("host")) for node in nodes if isinstance(node, dict)] if isinstance(nodes, list) else []
            )
            told.append(f"preflight failed on {', '.join(hosts)}")
        elif event["event"] == "bad_step":
            told.append(f"step {event.get('step')} was not applied: {event.get('reason')}")
    return told


def counts(lines: Sequence[TopLine]) -> str:
    """Return how many runs are in each state, and the GPUs in use, in words."""
    states = Counter(line.row.state for line in lines)
    words = [f"{count} {state.value.lower().replace('_', ' ')}" for state, count in states.items()]
    gpus = sum(line.gpus_now for line in lines)
    return ", ".join([f"{gpus} GPU{'' if gpus == 1 else 's'} in use", *words]) if lines else "no runs"
