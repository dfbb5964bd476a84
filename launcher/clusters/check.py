"""Check a cluster file against the cluster itself. Nothing is submitted."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from launcher.contract import resources
from launcher.contract.config.cluster_file import ClusterFile, load_cluster
from launcher.contract.errors import ConfigError, TemplateError
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import ClusterSpec, RunSpec, TrainSpec
from launcher.contract.topology import build_topology
from launcher.scheduler.factory import scheduler_of
from launcher.submission.render import render, template_name


def cluster_problems(name: str) -> list[str]:
    """Return every problem of a cluster file, one line each."""
    try:
        found = load_cluster(name)
    except ConfigError as error:
        return list(error.problems)
    return [*_template(found), *_runtime(found), *_scheduler(found)]


def _template(found: ClusterFile) -> Iterator[str]:
    try:
        resources.find("templates", template_name(found))
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


def _scheduler(found: ClusterFile) -> Iterator[str]:
    """Yield what the cluster itself has against the file, and against a job with its default resources."""
    cluster = ClusterSpec(**{name: getattr(found, name) for name in ClusterSpec.__dataclass_fields__})

    def script() -> str:
        batch = TrainSpec(global_batch_size=found.resources.world_size)
        spec = RunSpec(name="cluster-check", cluster=cluster, resources=found.resources, train=batch)
        return render(spec, build_topology(spec, None), RunPaths(Path("/nowhere/cluster-check")), "python")

    return scheduler_of(cluster.scheduler).cluster_problems(cluster, found.resources, script)
