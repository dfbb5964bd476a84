"""Partitions of a cluster, as sinfo shows them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

_GPU = re.compile(r"\bgpu:(?:([A-Za-z][\w.-]*):)?(\d+)")  # gpu:8, gpu:h100:8(S:0-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A partition as sinfo has it; sizes are those that every node of it has."""

    name: str
    is_default: bool
    time_limit: str | None
    """In Slurm's notation; None for no limit."""
    nodes: int
    cpus: int
    memory_mib: int
    gpus: int
    gpu_type: str | None


def parse_partitions(text: str) -> list[Partition]:
    """Return the partitions in lines `name*|up|limit|nodes|cpus|memory|gres`, of which each kind of node has one."""
    by_name: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 6)
        if len(fields) != 7 or fields[1] != "up":
            continue
        name, _, limit, nodes, cpus, memory, gres = fields
        gpu = _GPU.search(gres)
        one = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            time_limit=None if limit in ("infinite", "n/a") else limit,
            nodes=_leading_number(nodes),
            cpus=_leading_number(cpus),
            memory_mib=_leading_number(memory),
            gpus=int(gpu.group(2)) if gpu else 0,
            gpu_type=gpu.group(1) if gpu else None,
        )
        other = by_name.get(one.name)
        by_name[one.name] = one if other is None else _common(other, one)
    return list(by_name.values())


def _common(one: Partition, other: Partition) -> Partition:
    """Return what nodes of both kinds have."""
    return replace(
        one,
        nodes=one.nodes + other.nodes,
        cpus=min(one.cpus, other.cpus),
        memory_mib=min(one.memory_mib, other.memory_mib),
        gpus=min(one.gpus, other.gpus),
        gpu_type=one.gpu_type if one.gpu_type == other.gpu_type else None,
    )


def _leading_number(text: str) -> int:
    """Return 64 for `64` and for `64+`, as sinfo writes a lower bound."""
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0
