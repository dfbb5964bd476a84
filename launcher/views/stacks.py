"""`launcher stacks`: where every rank stands, with ranks that stand at the same place as one group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

from launcher.contract.rundir import JsonObject

_CODE = ("/site-packages/", "/bundle/code.zip/")
"""Where packages and a run's own code are."""
MAIN = "MainThread"


@dataclass(frozen=True, kw_only=True, slots=True)
class StackFrame:
    """One frame of a thread."""

    file: str
    """Source file."""
    line: int
    """Line in it."""
    function: str
    """Name of the function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackThread:
    """One Python thread."""

    name: str
    """`MainThread` for the one that trains."""
    frames: tuple[StackFrame, ...]
    """The outermost first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankProcess:
    """The process of a rank."""

    rank: int
    """Number of the rank."""
    host: str
    """The node that it is on."""
    pid: int
    """Process id there."""
    process: str
    """The kernel's word for what it is doing, e.g. `S (sleeping)`."""
    seconds: float | None
    """Time since its phase began; null where it gave no answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StackGroup:
    """Ranks that stand at the same place."""

    ranks: tuple[int, ...]
    """Numbers of the ranks."""
    answered: bool
    """Whether they answered. What does not is stopped, or keeps Python's lock (GIL)."""
    phase: str | None
    """`loading`, `data`, `step`, `guard`, `evaluation` or `checkpoint`; null where they gave no answer."""
    step: int | None
    """Number of finished steps; null where they gave no answer."""
    processes: tuple[RankProcess, ...]
    """Each rank's process."""
    threads: tuple[StackThread, ...]
    """Threads of the first rank, the main one first. The main threads of the others are equal to its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """Where the ranks of an attempt stand."""

    run: str
    """The run's name."""
    attempt: str
    """The attempt that is running."""
    hosts: int
    """Number of its nodes."""
    groups: tuple[StackGroup, ...]
    """The ranks that gave no answer first, then the smallest groups: those that most likely hold up the others."""
    silent: tuple[int, ...]
    """Ranks of which no process was found: they start, or end, or their node does not answer."""


def gather(run: str, attempt: str, hosts: int, world_size: int, lines: Iterable[JsonObject]) -> Stacks:
    """Return what the lines of all nodes say, ranks with equal main threads together."""
    abouts: dict[int, JsonObject] = {}
    frames: dict[int, dict[str, list[StackFrame]]] = {}
    for line in lines:
        if "host" in line:
            abouts[line["rank"]] = line
        else:
            frame = StackFrame(file=line["file"], line=line["line"], function=line["function"])
            frames.setdefault(line["rank"], {}).setdefault(line["thread"], []).append(frame)
    groups: dict[object, list[int]] = {}
    for rank in sorted(abouts):
        place = (*_place(abouts[rank]), tuple(frames.get(rank, {}).get(MAIN, ())))
        groups.setdefault(place, []).append(rank)
    found = [_group([abouts[rank] for rank in ranks], frames.get(ranks[0], {})) for ranks in groups.values()]
    order = sorted(found, key=lambda group: (group.answered, len(group.ranks), group.ranks))
    silent = tuple(rank for rank in range(world_size) if rank not in abouts)
    return Stacks(run=run, attempt=attempt, hosts=hosts, groups=tuple(order), silent=silent)


def _place(about: JsonObject) -> tuple[bool, str | None, int | None]:
    return bool(about["answered"]), about.get("phase"), about.get("step")


def _group(abouts: Sequence[JsonObject], frames: dict[str, list[StackFrame]]) -> StackGroup:
    answered, phase, step = _place(abouts[0])
    names = ("rank", "host", "pid", "process")
    processes = [RankProcess(**{name: about[name] for name in names}, seconds=about.get("seconds")) for about in abouts]
    return StackGroup(
        ranks=tuple(process.rank for process in processes),
        answered=answered,
        phase=phase,
        step=step,
        processes=tuple(processes),
        threads=tuple(StackThread(name=name, frames=tuple(found)) for name, found in frames.items()),
    )


def render(stacks: Stacks, *, all_threads: bool = False) -> str:
    """Return the groups as text: who, in which phase of which step, and the frames, the innermost last."""
    count = sum(len(group.ranks) for group in stacks.groups)
    ranks, nodes = _counted(count, "rank"), _counted(stacks.hosts, "node")
    parts = [f"run {stacks.run}, attempt {stacks.attempt}: {ranks} on {nodes}"]
    parts += [_group_text(group, all_threads=all_threads) for group in stacks.groups]
    if stacks.silent:
        parts.append(f"{names(stacks.silent)}: no process; it is starting or ending, or its node does not answer")
    return "\n\n".join(parts)


def _group_text(group: StackGroup, *, all_threads: bool) -> str:
    first = group.processes[0]
    where = f" ({first.host}, process {first.pid})" if len(group.ranks) == 1 else ""
    lines = [f"{names(group.ranks)}{where}: {_state(group)}"]
    for thread in group.threads:
        if all_threads:
            lines.append(f"  {thread.name}")
        if all_threads or thread.name == MAIN:
            lines += [f"    {_short(frame.file)}:{frame.line} {frame.function}" for frame in thread.frames]
    return "\n".join(lines)


def _state(group: StackGroup) -> str:
    if not group.answered:
        process = group.processes[0].process
        why = "stopped" if process.startswith("T") else "it keeps Python's lock (GIL), or the kernel keeps it"
        return f"no answer; the process is {process}: {why}"
    seconds = [process.seconds or 0.0 for process in group.processes]
    low, high = round(min(seconds)), round(max(seconds))
    return f"{group.phase} after step {group.step}, for {f'{low} to ' if low < high else ''}{high} s"


def names(numbers: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0-2,5`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _short(file: str) -> str:
    """Return the path from the package on."""
    for folder in _CODE:
        file = file.rpartition(folder)[2]
    return file
