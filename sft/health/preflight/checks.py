"""Checks of one node, each a function that takes a few seconds at most.

A check that fails says whose fault it is: the node's, or the run's (a full disk is full on every node).
"""

from __future__ import annotations

import errno
import os
import platform
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.contract.rundir import sync_path
from launcher.contract.versions import describe_versions, installed_versions, version_problems

Fault = Literal["node", "run"]

SHARED_FAULTS = ("run directory", "packages")
"""Checks whose failure is the run's fault if most nodes fail them."""

_NVIDIA_SMI_SECONDS = 15
_MIB = 2**20
_LEAST_FILES = 1024  # what Linux gives by default
_LEAST_LOCKED = 64 * _MIB
_INFINIBAND = Path("/sys/class/infiniband")


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """The result of one check."""

    name: str
    ok: bool
    detail: str
    fault: Fault = "node"


def check_gpus(wanted: int) -> Check:
    """Check that the driver answers and shows as many GPUs as wanted, without uncorrected memory errors."""
    if not wanted:
        return Check(name="gpus", ok=True, detail="skipped: CPU ranks")
    if shutil.which("nvidia-smi") is None:
        return Check(name="gpus", ok=True, detail="skipped: no nvidia-smi")
    query = "--query-gpu=index,ecc.errors.uncorrected.volatile.total"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name="gpus", ok=False, detail=f"nvidia-smi gave no answer: {error}")
    if done.returncode != 0:
        return Check(name="gpus", ok=False, detail=f"nvidia-smi failed: {(done.stderr or done.stdout).strip()[:200]}")
    rows = [[word.strip() for word in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    # GPUs without ECC have [N/A] there, which is not a digit.
    faulty = [f"GPU {row[0]}: {row[1]}" for row in rows if len(row) > 1 and row[1].isdigit() and int(row[1])]
    if len(rows) < wanted:
        return Check(name="gpus", ok=False, detail=f"{len(rows)} GPUs, and resources.gpus_per_node is {wanted}")
    if faulty:
        return Check(name="gpus", ok=False, detail=f"uncorrected ECC errors: {', '.join(faulty)}")
    return Check(name="gpus", ok=True, detail=f"{len(rows)} GPUs, no uncorrected ECC errors")


def check_shm(least_mib: int, path: Path = Path("/dev/shm")) -> Check:
    """Check the shared memory, which NCCL and gloo use between the ranks of a node. Containers often have 64 MiB."""
    try:
        free = shutil.disk_usage(path).free // _MIB
    except OSError as error:
        return Check(name="shm", ok=False, detail=f"{path}: {error.strerror}")
    return Check(name="shm", ok=free >= least_mib, detail=f"{free} MiB free in {path}, {least_mib} needed")


def check_limits() -> Check:
    """Check what the shell that submitted, or the node's Slurm, allows a process: CPU time, files, locked memory."""
    cpu, _ = resource.getrlimit(resource.RLIMIT_CPU)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    problems = []
    if cpu != unlimited:
        problems.append(f"ulimit -t: {cpu} s of CPU time, after which ranks are killed")
    if files != unlimited and files < _LEAST_FILES:
        problems.append(f"ulimit -n: {files} open files, {_LEAST_FILES} needed")
    if locked != unlimited and locked < _LEAST_LOCKED and _uses_infiniband():
        problems.append(f"ulimit -l: {locked // 1024} KiB of locked memory, too little for InfiniBand")
    detail = "; ".join(problems) or "CPU time, open files, locked memory"
    return Check(name="limits", ok=not problems, detail=detail, fault="run")


def _uses_infiniband() -> bool:
    """Return whether NCCL registers memory with an InfiniBand device here: a card may be in Ethernet mode."""
    if os.environ.get("NCCL_IB_DISABLE") == "1" or not _INFINIBAND.is_dir():
        return False
    layers = [path.read_text(encoding="ascii").strip() for path in _INFINIBAND.glob("*/ports/*/link_layer")]
    return "InfiniBand" in layers


def check_run_directory(folder: Path, host: str, least_gib: float) -> Check:
    """Check that a file can be written, synced and renamed where checkpoints go, and that there is space."""
    folder.mkdir(parents=True, exist_ok=True)
    written, renamed = folder / f".preflight-{host}.partial", folder / f".preflight-{host}"
    try:
        with written.open("wb") as file:
            file.write(os.urandom(4096))
            file.flush()
            os.fsync(file.fileno())
        os.replace(written, renamed)
        sync_path(folder)
        renamed.unlink()
        free = shutil.disk_usage(folder).free / 2**30
    except OSError as error:
        written.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        detail = f"{folder} cannot be written: {error.strerror}"
        return Check(name="run directory", ok=False, detail=detail, fault="run" if full else "node")
    if free < least_gib:
        detail = f"{free:.1f} GiB free in {folder}, and {least_gib:g} are needed"
        return Check(name="run directory", ok=False, detail=detail, fault="run")
    return Check(name="run directory", ok=True, detail=f"written, synced, renamed; {free:.0f} GiB free")


def node_versions() -> dict[str, str]:
    """Return by name the versions that must be the same on all nodes."""
    versions = installed_versions() | {"kernel": platform.release()}
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        versions["driver"] = driver.read_text().splitlines()[0]
    return versions


def check_packages(versions: Mapping[str, str]) -> Check:
    """Check that the node's Python and packages are versions that work."""
    problems = version_problems(versions)
    return Check(name="packages", ok=not problems, detail="; ".join(problems) or describe_versions(versions))


def check_versions(versions: Mapping[str, str], reference: Mapping[str, str]) -> Check:
    """Check that the node's versions are those of most nodes."""
    other = [
        f"{name} {versions.get(name, 'absent')}, elsewhere {reference[name]}"
        for name in reference
        if versions.get(name) != reference[name]
    ]
    return Check(name="versions", ok=not other, detail="; ".join(other) or "as elsewhere")


def most_common(versions: list[Mapping[str, str]]) -> dict[str, str]:
    """Return each version as most nodes have it, in a tie as the first node has it, which prepared the data."""
    names = sorted({name for known in versions for name in known})
    return {name: Counter(known.get(name, "absent") for known in versions).most_common(1)[0][0] for name in names}


def check_clock(offset: float, uncertainty: float, limit: float) -> Check:
    """Check the node's clock against the first node's. All arguments are in seconds."""
    detail = f"{offset:+.3f} s from the first node's, within {uncertainty:.3f} s"
    return Check(name="clock", ok=abs(offset) - uncertainty <= limit, detail=detail)
