"""Check a cluster file against the cluster itself. Nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.contract import resources
from launcher.contract.config.cluster_file import ClusterFile, load_cluster
from launcher.contract.errors import ConfigError, LauncherError, SchedulerError, TemplateError, did_you_mean
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, RunSpec, TrainSpec
from launcher.contract.topology import build_topology
from launcher.scheduler import slurm
from launcher.scheduler.slurm import time_limit_minutes
from launcher.submission.render import render


def cluster_problems(name: str) -> list[str]:
    """Return every problem of a cluster file, one line each."""
    try:
        found = load_cluster(name)
    except ConfigError as error:
        return list(error.problems)
    return [*_template(found), *_runtime(found), *(_slurm(found) if found.scheduler == "slurm" else [])]


def _template(found: ClusterFile) -> Iterator[str]:
    try:
        resources.find("templates", found.template or f"{found.scheduler}.sh.j2")
    except TemplateError as error:
        yield f"template: {error}"


def _runtime(found: ClusterFile) -> Iterator[str]:
    runtime = found.runtime
    if runtime.kind == "venv" and not (runtime.path and (Path(runtime.path) / "bin" / "activate").is_file()):
        yield f"runtime.path: {runtime.path} is not a venv: it has no bin/activate"
    if runtime.kind == "conda" and not runtime.path:
        yield "runtime.path: missing; kind conda needs an environment's name or directory"
    if runtime.kind == "conda" and runtime.path and "/" in runtime.path and not Path(runtime.path).is_dir():
        yield f"runtime.path: {runtime.path} is not a directory"
    if runtime.kind in ("pyxis", "apptainer"):
        if not runtime.image:
            yield f"runtime.image: missing; kind {runtime.kind} needs it"
        elif runtime.image.startswith("/") and not Path(runtime.image).exists():
            yield f"runtime.image: {runtime.image} does not exist"
    if runtime.kind == "apptainer" and not runtime.modules and shutil.which("apptainer") is None:
        yield "runtime.kind: apptainer is not on PATH, and runtime.modules loads nothing that could provide it"


def _slurm(found: ClusterFile) -> Iterator[str]:
    try:
        partitions = {partition.name: partition for partition in slurm.partitions()}
        has_pyxis = "--container-image" in slurm.srun_help()
    except SchedulerError as error:
        yield f"scheduler: {error}"
        return
    wanted = found.resources
    if found.runtime.kind == "pyxis" and not has_pyxis:
        yield "runtime.kind: pyxis: srun knows no --container-image, so the plugin is not installed here"
    chosen = partitions.get(wanted.partition) if wanted.partition else None
    if wanted.partition and chosen is None:
        near = did_you_mean(wanted.partition, partitions)
        yield f"resources.partition: {wanted.partition!r} is unknown{near or ';'} Slurm has {', '.join(partitions)}"
        return
    if chosen is not None and wanted.gpus_per_node > chosen.gpus:
        yield f"resources.gpus_per_node: {wanted.gpus_per_node}, and nodes of {chosen.name} have {chosen.gpus}"
    longest = time_limit_minutes(chosen.time_limit) if chosen is not None else None
    asked = time_limit_minutes(wanted.time)
    if chosen is not None and longest is not None and asked is not None and asked > longest:
        yield f"resources.time: {wanted.time} is above the limit of {chosen.name}, {chosen.time_limit}"
    yield from _refusal(found)


def _refusal(found: ClusterFile) -> Iterator[str]:
    """Yield why sbatch refuses a job of one node, written as the file says."""
    cluster = ClusterSpec(**{name: getattr(found, name) for name in ClusterSpec.__dataclass_fields__})
    batch = TrainSpec(global_batch_size=found.resources.world_size)
    spec = RunSpec(name="cluster-check", cluster=cluster, resources=found.resources, train=batch)
    try:
        script = render(spec, build_topology(spec, None), RunPaths(Path("/nowhere/cluster-check")), "python")
        slurm.expected_start(script)
    except LauncherError as error:
        yield f"sbatch --test-only: {error}"
