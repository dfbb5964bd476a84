"""Check a cluster file against the cluster itself. Nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.contract import resources
from launcher.contract.config.cluster_file import ClusterFile, load_cluster
from launcher.contract.errors import ConfigError, TemplateError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, RunSpec, TrainSpec
from launcher.contract.topology import build_topology
from launcher.scheduler.factory import scheduler_of
from launcher.submission.render_script import render, template_name


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedCluster:
    """What `cluster check --json` prints."""

    cluster: str
    """The cluster's name."""
    problems: list[str]
    """What is wrong with its file, one line each."""


def cluster_problems(name: str) -> list[str]:
    """Return every problem of a cluster file, one line each."""
    try:
        cluster = load_cluster(name)
    except ConfigError as error:
        return list(error.problems)
    return [*_template(cluster), *_runtime(cluster), *_scheduler(cluster)]


def _template(cluster: ClusterFile) -> Iterator[str]:
    try:
        resources.find("templates", template_name(cluster))
    except TemplateError as error:
        yield f"template: {error}"


def _runtime(cluster: ClusterFile) -> Iterator[str]:
    runtime = cluster.runtime
    if runtime.kind == "venv" and not runtime.path:
        yield "runtime.path: missing; kind venv needs its directory"
    if runtime.kind == "venv" and runtime.path and not (Path(runtime.path) / "bin" / "activate").is_file():
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


def _scheduler(cluster: ClusterFile) -> Iterator[str]:
    """Yield why the cluster refuses the file's values, or a job with its default resources."""
    settings = ClusterSpec(**{name: getattr(cluster, name) for name in ClusterSpec.__dataclass_fields__})

    def script() -> str:
        batch = TrainSpec(global_batch_size=cluster.resources.world_size)
        spec = RunSpec(name="cluster-check", cluster=settings, resources=cluster.resources, train=batch)
        return render(spec, build_topology(spec, None), RunPaths(Path("/nowhere/cluster-check")), "python")

    return scheduler_of(settings.scheduler).cluster_problems(settings, cluster.resources, script)
