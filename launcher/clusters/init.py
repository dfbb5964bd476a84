"""Write a first cluster file from what Slurm reports, with the reason beside each value.

Rejected: asking the user questions. Every answer is in sinfo, or is a choice that a comment in the file explains.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.resources import search_path
from launcher.contract.rundir import RUN_NAME
from launcher.scheduler.slurm import commands
from launcher.scheduler.slurm.partitions import Partition

_MODULES = re.compile(r"(cuda|nccl|python|miniforge|anaconda|apptainer|singularity)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """What Slurm and this machine say about the cluster."""

    partitions: Sequence[Partition]
    names_resolve: bool
    """Whether this machine can resolve the name of a node."""
    has_pyxis: bool
    has_apptainer: bool
    modules: Sequence[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstFile:
    """What `cluster init --json` prints."""

    cluster: str
    """The cluster's name."""
    file: str
    """The file that was written."""


def survey() -> Survey:
    """Ask Slurm and this machine, or raise SchedulerError if Slurm shows no partition."""
    partitions = commands.partitions()
    if not partitions:
        raise SchedulerError("sinfo shows no partition; is this account allowed to use the cluster?")
    return Survey(
        partitions=partitions,
        names_resolve=_resolves((commands.node_names() or [""])[0]),
        has_pyxis="--container-image" in commands.srun_help(),
        has_apptainer=shutil.which("apptainer") is not None,
        modules=_modules(),
    )


def best_partition(partitions: Sequence[Partition]) -> Partition:
    """Return Slurm's default partition, or the largest one with GPUs if the default has none and others do."""
    default = next((partition for partition in partitions if partition.is_default), partitions[0])
    with_gpus = [partition for partition in partitions if partition.gpus]
    if default.gpus or not with_gpus:
        return default
    return max(with_gpus, key=lambda partition: partition.nodes)


def cluster_yaml(name: str, answers: Survey) -> str:
    """Return the text of the file."""
    chosen = best_partition(answers.partitions)
    others = ", ".join(partition.name for partition in answers.partitions if partition is not chosen) or "none"
    which = f"{chosen.nodes} nodes{', the default' if chosen.is_default else ''}; others: {others}"
    per_task = max(1, chosen.cpus // max(1, chosen.gpus))
    kinds = f", type {chosen.gpu_type}" if chosen.gpu_type else ""
    rows = [
        ("scheduler: slurm", "sinfo answered"),
        ("rendezvous: hostname", "node names resolve here")
        if answers.names_resolve
        else ("rendezvous: node_addr", "node names do not resolve here; Slurm's own address of the first node does"),
        ("runtime:", ""),
        ("  kind: none", f"the Python that runs the launcher, if all nodes see it; {_other_runtimes(answers)}"),
        ("resources:", "defaults beneath the run's own"),
        (f"  partition: {chosen.name}", which),
    ]
    if chosen.gpus:
        rows.insert(1, ("gpu_directive: gpus_per_node", "where sbatch refuses it: gres, gpus_per_task or none"))
        rows.append((f"  gpus_per_node: {chosen.gpus}", f"sinfo: gpu:{chosen.gpus} on each node{kinds}"))
    rows.append((f"  cpus_per_task: {per_task}", f"{chosen.cpus} CPUs of a node / {max(1, chosen.gpus)} ranks on it"))
    if chosen.time_limit:
        rows.append((f"  time: {chosen.time_limit}", "the partition's longest"))
    head = f"# Cluster {name}, as Slurm described it. Read it, correct it, then: launcher cluster check {name}\n"
    if answers.modules:
        head += f"# Environment modules that runs may want (runtime.modules): {', '.join(answers.modules)}\n"
    head += (
        f"# A node has {chosen.memory_mib} MiB of memory; resources.memory_per_node unset takes the default of Slurm.\n"
    )
    width = max(len(text) for text, _ in rows)
    return head + "".join(f"{text:<{width}}  # {why}\n" if why else f"{text}\n" for text, why in rows)


def write_first(name: str) -> Path:
    """Write the file into the user's folder and return its path.

    Raise RunStateError if there already is one.
    """
    if not RUN_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} is not a valid name for a cluster; use letters, digits, '.', '_' and '-'")
    path = search_path("cluster_configs")[0] / f"{name}.yaml"
    text = cluster_yaml(name, survey()) if not path.exists() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RunStateError(f"{path} exists already; remove it, or choose another name") from None
    return path


def _other_runtimes(answers: Survey) -> str:
    names = [name for name, there in (("pyxis", answers.has_pyxis), ("apptainer", answers.has_apptainer)) if there]
    return f"also possible: venv, conda{''.join(f', {name}' for name in names)}"


def _resolves(host: str) -> bool:
    try:
        socket.gethostbyname(host)
    except OSError:
        return False
    return True


def _modules() -> list[str]:
    """Return the environment modules of interest.

    MODULEPATH tells them; `module` itself cannot be called, being a function of the user's shell.
    """
    folders = [Path(folder) for folder in os.environ.get("MODULEPATH", "").split(":") if folder]
    names = {path.name for folder in folders if folder.is_dir() for path in folder.iterdir()}
    return sorted(name for name in names if _MODULES.match(name))
