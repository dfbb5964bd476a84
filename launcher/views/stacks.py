"""`launcher stacks`: where every rank stands, with ranks that stand at the same place as one group."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from launcher.contract.rank_sockets import Frame
from launcher.contract.rundir import JsonObject

_INSTALLED = "/site-packages/"
MAIN = "MainThread"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """What one rank says."""

    rank: int
    host: str
    pid: int
    process: str
    """The kernel's word for what its process is doing."""
    answered: bool
    phase: str = ""
    step: int = 0
    """Number of finished steps."""
    seconds: float = 0.0
    """Time since the phase began."""
    threads: dict[str, list[Frame]] = field(default_factory=dict)

    @property
    def place(self) -> tuple[bool, str, int, tuple[Frame, ...]]:
        """What ranks of one group have in common."""
        return self.answered, self.phase, self.step, tuple(self.threads.get(MAIN, ()))


@dataclass(frozen=True, kw_only=True, slots=True)
class Stacks:
    """The ranks of an attempt, in groups, those that most likely hold up the others first."""

    run: str
    attempt: str
    hosts: int
    groups: tuple[tuple[Rank, ...], ...]
    silent: tuple[int, ...]
    """Ranks of which no process was found."""

    def as_json(self) -> JsonObject:
        """Return the value for --json."""
        return {
            "run": self.run,
            "attempt": self.attempt,
            "groups": [_group_json(group) for group in self.groups],
            "silent": list(self.silent),
        }


def gather(run: str, attempt: str, hosts: int, world_size: int, lines: Iterable[JsonObject]) -> Stacks:
    """Return what the lines of all nodes say, ranks with equal main threads together."""
    abouts: dict[int, JsonObject] = {}
    threads: dict[int, dict[str, list[Frame]]] = {}
    for line in lines:
        if "host" in line:
            abouts[line["rank"]] = line
        else:
            of_rank = threads.setdefault(line["rank"], {})
            of_rank.setdefault(line["thread"], []).append((line["file"], line["line"], line["function"]))
    ranks = [_rank(abouts[number], threads.get(number, {})) for number in sorted(abouts)]
    groups: dict[tuple[bool, str, int, tuple[Frame, ...]], list[Rank]] = {}
    for rank in ranks:
        groups.setdefault(rank.place, []).append(rank)
    order = sorted(groups.values(), key=lambda group: (group[0].answered, len(group), group[0].rank))
    silent = [number for number in range(world_size) if number not in abouts]
    return Stacks(run=run, attempt=attempt, hosts=hosts, groups=tuple(map(tuple, order)), silent=tuple(silent))


def _rank(about: JsonObject, threads: dict[str, list[Frame]]) -> Rank:
    known = {name: about[name] for name in ("rank", "host", "pid", "process", "answered")}
    place = {name: about[name] for name in ("phase", "step", "seconds") if about.get(name) is not None}
    return Rank(**known, **place, threads=threads)


def render(stacks: Stacks, *, all_threads: bool = False) -> str:
    """Return the groups as text: who, in which phase of which step, and the frames, the innermost last."""
    count = sum(map(len, stacks.groups))
    on = f"on {stacks.hosts} node{'s' if stacks.hosts > 1 else ''}"
    parts = [f"run {stacks.run}, attempt {stacks.attempt}: {_ranks(count)} {on}"]
    parts += [_group_text(group, all_threads=all_threads) for group in stacks.groups]
    if stacks.silent:
        parts.append(f"{names(stacks.silent)}: no process; it is starting or ending, or its node does not answer")
    return "\n\n".join(parts)


def _group_text(group: Sequence[Rank], *, all_threads: bool) -> str:
    first = group[0]
    who = names([rank.rank for rank in group])
    if len(group) == 1:
        who += f" ({first.host}, process {first.pid})"
    lines = [f"{who}: {_state(group)}"]
    for name, frames in first.threads.items():
        if all_threads:
            lines.append(f"  {name}")
        if all_threads or name == MAIN:
            lines += [f"    {_short(file)}:{line} {function}" for file, line, function in frames]
    return "\n".join(lines)


def _state(group: Sequence[Rank]) -> str:
    first = group[0]
    if not first.answered:
        why = "stopped" if first.process.startswith("T") else "it keeps Python's lock (GIL), or the kernel keeps it"
        return f"no answer; the process is {first.process}: {why}"
    low, high = min(rank.seconds for rank in group), max(rank.seconds for rank in group)
    time = f"{high:.0f} s" if round(low) == round(high) else f"{low:.0f} to {high:.0f} s"
    return f"{first.phase} after step {first.step}, for {time}"


def names(numbers: Sequence[int]) -> str:
    """Return `rank 3`, or `ranks 0-2,5`."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    spans = [(run[0][1], run[-1][1]) for run in runs]
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)
    return f"rank{'s' if len(numbers) > 1 else ''} {text}"


def _ranks(count: int) -> str:
    return f"{count} rank{'' if count == 1 else 's'}"


def _short(file: str) -> str:
    """Return the path from the package on."""
    return file.rpartition(_INSTALLED)[2]


def _group_json(group: Sequence[Rank]) -> JsonObject:
    first = group[0]
    return {
        "ranks": [rank.rank for rank in group],
        "answered": first.answered,
        "phase": first.phase or None,
        "step": first.step if first.answered else None,
        "processes": [
            {"rank": rank.rank, "host": rank.host, "pid": rank.pid, "process": rank.process, "seconds": rank.seconds}
            for rank in group
        ],
        "threads": [
            {
                "name": name,
                "frames": [{"file": file, "line": line, "function": function} for file, line, function in frames],
            }
            for name, frames in first.threads.items()
        ],
    }
