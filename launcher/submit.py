"""Create the run directory, submit its script, record the job; what fails before there is a job leaves nothing."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launcher import processes
from launcher.errors import LauncherError, RunStateError, SchedulerError
from launcher.manifest import Attempt, Manifest, describe_run, write_manifest
from launcher.plan import Plan
from launcher.render import render
from launcher.resources import checkout_root
from launcher.rundir import RunPaths, append_event, write_atomic
from launcher.spec import RunSpec, to_yaml
from launcher.topology import describe_batch


def submit(plan: Plan, command: Sequence[str], parent_run: str | None = None) -> Attempt:
    """Start a new run."""
    script = script_of(plan)
    manifest, diff = describe_run(plan.paths.name, plan.topology, command, parent_run)
    with _new_directory(plan.paths):
        write_atomic(plan.paths.config, to_yaml(plan.spec))
        write_atomic(plan.paths.script, script, mode=0o755)
        plan.paths.logs.mkdir()
        if diff:
            write_atomic(plan.paths.source_diff, diff)
        write_manifest(plan.paths, manifest)
        attempt = _start(plan.paths, plan.spec)
    _record(plan.paths, manifest, attempt)
    return attempt


def script_of(plan: Plan) -> str:
    """The plan's batch script, for the Python and the checkout this process runs from."""
    return render(plan.spec, plan.topology, plan.paths, sys.executable, checkout_root())


def start_again(paths: RunPaths, spec: RunSpec, manifest: Manifest) -> Attempt:
    """Submit the script of an existing run once more."""
    attempt = _start(paths, spec)
    _record(paths, manifest, attempt)
    return attempt


def _start(paths: RunPaths, spec: RunSpec) -> Attempt:
    from launcher.executor import ScriptLocalExecutor, ScriptSlurmExecutor

    aside = paths.root / "submitit"
    aside.mkdir(exist_ok=True)
    if spec.cluster.scheduler == "slurm":
        job_id = ScriptSlurmExecutor(aside, paths.script.read_text(encoding="utf-8")).submit_script()
        return Attempt(job_id=job_id, scheduler="slurm", submitted_at=time.time())
    local = ScriptLocalExecutor(aside, spec.resources.time, spec.resources.signal_seconds)
    job_id = local.submit_script(paths.script)
    return Attempt(
        job_id=job_id,
        scheduler="local",
        submitted_at=time.time(),
        host=socket.gethostname(),
        process_start=processes.start_ticks(int(job_id)),
    )


def _record(paths: RunPaths, manifest: Manifest, attempt: Attempt) -> None:
    write_manifest(paths, manifest.with_attempt(attempt))
    append_event(paths, "submitted", job_id=attempt.job_id, scheduler=attempt.scheduler)


@contextlib.contextmanager
def _new_directory(paths: RunPaths) -> Iterator[None]:
    """The run directory, made by whoever comes first and removed again if the body fails before a job exists."""
    from launcher.executor import SubmissionUnknown

    made = [folder for folder in (paths.root.parent, *paths.root.parent.parents) if not folder.exists()]
    try:
        paths.root.parent.mkdir(parents=True, exist_ok=True)
        paths.root.mkdir(mode=0o700)
    except FileExistsError:
        raise RunStateError(
            f"run {paths.name} exists in {paths.root.parent}; "
            f"go on with `launcher resubmit {paths.name}`, or choose another name (name=...)"
        ) from None
    except OSError as error:
        raise LauncherError(f"run_root: {paths.root} cannot be created: {error.strerror}") from None
    try:
        yield
    except SubmissionUnknown as error:
        raise SchedulerError(
            f"{error}\nThe job may be queued all the same: look with `squeue --me --name={paths.name}`. "
            f"If it is not there, remove {paths.root} and submit again."
        ) from None
    except BaseException:
        shutil.rmtree(paths.root, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def summary(plan: Plan) -> str:
    """What will run, in numbers, and where each value that is not a default came from."""
    spec, topology = plan.spec, plan.topology
    resources = spec.resources
    device = f"{resources.gpus_per_node} GPUs" if resources.gpus_per_node else "CPU"
    lines = [
        f"run        {spec.name} on cluster {spec.cluster.name} ({spec.cluster.scheduler})",
        f"nodes      {resources.nodes} x {resources.ranks_per_node} ranks ({device})",
        f"topology   {topology.describe()}",
        f"batch      {describe_batch(spec, topology)}",
        f"directory  {plan.paths.root}",
        "values that are not defaults:",
    ]
    rows = [(key, _short(value), source) for key, value, source in plan.config.changed()]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    lines += [f"  {key:<{key_width}}  {value:<{value_width}}  ({source})" for key, value, source in rows]
    return "\n".join(lines)


def _short(value: object, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def next_steps(plan: Plan, attempt: Attempt) -> str:
    """The job, and what to type now."""
    name, root = plan.paths.name, plan.paths.root.parent
    where = "" if root == Path.cwd() / "runs" else f" --run-root {shlex.quote(str(root))}"
    what = "job" if attempt.scheduler == "slurm" else "process"
    return (
        f"submitted  {what} {attempt.job_id}, script {plan.paths.script}\n"
        f"next       launcher status {name}{where}\n"
        f"           launcher logs -f {name}{where}"
    )
