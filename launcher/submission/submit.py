"""Create the run directory, submit its script, record the job; what fails before there is a job leaves nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.contract import processes
from launcher.contract.errors import LauncherError, RunStateError, SchedulerError
from launcher.contract.manifest import Attempt, Manifest, describe_run, read_manifest, write_manifest
from launcher.contract.rundir import RunPaths, append_event, read_lines, write_atomic
from launcher.contract.spec import RunSpec, to_yaml
from launcher.contract.topology import describe_batch
from launcher.planning.run_plan import run_cost
from launcher.runs import nodes
from launcher.runs.find import all_runs, default_run_root
from launcher.submission.after import dependency_option
from launcher.submission.claim import LOCK_FILE, claim
from launcher.submission.code_snapshot import has_own_code, take_snapshot
from launcher.submission.intent import Intent, begin, end, find, pending
from launcher.submission.lockfile import write_lockfile
from launcher.submission.plan import Plan
from launcher.submission.render import render
from launcher.submission.secret_files import check_secrets, remove_secrets, write_secrets


def submit(
    plan: Plan,
    command: Sequence[str],
    parent_run: str | None = None,
    group: str | None = None,
    waits_for: Sequence[str] = (),
) -> Attempt:
    """Start a new run, or finish the submission of this very run that was interrupted.

    Killed at any point and called again, it makes one job: what is on disk says how far the first call came.
    `waits_for` are clauses of sbatch's --dependency.
    """
    check_secrets(plan.spec)
    with _directory(plan.paths):
        if not _is_unfinished(plan):
            manifest, diff = describe_run(plan.paths.name, plan.topology, command, parent_run)
            _prepare(plan, dataclasses.replace(manifest, group=group), diff)
        return start(plan.paths, plan.spec, waits_for)


def script_of(plan: Plan) -> str:
    """The plan's batch script, for the Python this process runs in and the copy of its code."""
    code = plan.paths.code if has_own_code(plan.spec) else None
    return render(plan.spec, plan.topology, plan.paths, sys.executable, code)


def start(paths: RunPaths, spec: RunSpec, waits_for: Sequence[str] = ()) -> Attempt:
    """Submit the run's script, unless a submission that was begun before has a job already. Needs the claim."""
    manifest = read_manifest(paths)
    intent = pending(paths)
    attempt = find(paths, manifest.name, manifest.attempts, intent) if intent is not None else None
    if attempt is None:
        options = job_options(spec, waits_for) if spec.cluster.scheduler == "slurm" else dependency_option(spec)
        write_secrets(spec, paths)
        intent = begin(paths, spec.cluster.scheduler)
        attempt = _send_once(paths, spec, manifest, intent, options)
    record(paths, attempt)
    end(paths)
    return attempt


def prepare(plan: Plan, command: Sequence[str], group: str) -> None:
    """Make the run's directory, for a job that is submitted with those of other runs."""
    with _directory(plan.paths):
        if _is_unfinished(plan):
            raise RunStateError(f"the submission of run {plan.paths.name} was interrupted; finish or cancel it first")
        manifest, diff = describe_run(plan.paths.name, plan.topology, command, None)
        _prepare(plan, dataclasses.replace(manifest, group=group), diff)


def record(paths: RunPaths, attempt: Attempt) -> None:
    """Add a job to the run's manifest and events, unless it is there."""
    manifest = read_manifest(paths)
    if not any(known.job_id == attempt.job_id and known.token == attempt.token for known in manifest.attempts):
        write_manifest(paths, manifest.with_attempt(attempt))
    if not any(event.get("job_id") == attempt.job_id for event in _submissions(paths)):
        append_event(paths, "submitted", job_id=attempt.job_id, scheduler=attempt.scheduler)


def _send_once(paths: RunPaths, spec: RunSpec, manifest: Manifest, intent: Intent, options: Sequence[str]) -> Attempt:
    """Hand the script over; where that leaves open whether a job was made, ask for it."""
    from launcher.submission.executor import SubmissionUnknown

    try:
        return _send(paths, spec, intent, options)
    except SubmissionUnknown as error:
        attempt = _ask_for(paths, manifest, intent, error)
    except BaseException:
        remove_secrets(spec, paths)
        end(paths)
        raise
    return attempt


def _ask_for(paths: RunPaths, manifest: Manifest, intent: Intent, error: Exception) -> Attempt:
    print(f"{error}; asking Slurm what became of the job", file=sys.stderr)
    try:
        attempt = find(paths, manifest.name, manifest.attempts, intent)
    except SchedulerError as silence:
        raise SchedulerError(
            f"{error}\nThe job may be queued all the same, and Slurm cannot be asked now: {silence}\n"
            "Give the same command again later: it adopts the job if there is one, and submits it otherwise."
        ) from None
    if attempt is None:
        end(paths)
        raise SchedulerError(f"{error}\nSlurm has no such job, so nothing was submitted; try again.") from None
    return attempt


def _send(paths: RunPaths, spec: RunSpec, intent: Intent, options: Sequence[str]) -> Attempt:
    from launcher.submission.executor import ScriptLocalExecutor, ScriptSlurmExecutor

    aside = paths.root / "submitit"
    aside.mkdir(exist_ok=True)
    if spec.cluster.scheduler == "slurm":
        script = paths.script.read_text(encoding="utf-8")
        given = [*_comment(spec, intent), *options]
        job_id = ScriptSlurmExecutor(aside, script, given, spec.secret_names).submit_script()
        return Attempt(job_id=job_id, scheduler="slurm", submitted_at=time.time(), token=intent.token)
    local = ScriptLocalExecutor(aside, spec.resources.time, spec.resources.signal_seconds, intent.token)
    job_id = local.submit_script(paths.script)
    return Attempt(
        job_id=job_id,
        scheduler="local",
        submitted_at=time.time(),
        host=socket.gethostname(),
        process_start=processes.start_ticks(int(job_id)),
        token=intent.token,
    )


def _comment(spec: RunSpec, intent: Intent) -> list[str]:
    """The token as the job's comment, beside the user's own."""
    given = [option.partition("=")[2] for option in spec.resources.extra_sbatch if option.startswith("--comment=")]
    return [f"--comment={' '.join([*given[-1:], intent.token])}"]


def job_options(spec: RunSpec, waits_for: Sequence[str]) -> list[str]:
    """What is decided at each submission anew, and so is not in the script."""
    return [*_exclude(spec), *dependency_option(spec, waits_for)]


def _exclude(spec: RunSpec) -> list[str]:
    """The nodes to keep away from; this displaces the script's own --exclude, and so repeats it."""
    nodes.learn(all_runs(Path(spec.run_root)), spec.cluster)
    hosts = nodes.exclude_option(spec.cluster, spec.resources.exclude)
    return [f"--exclude={hosts}"] if hosts else []


def _submissions(paths: RunPaths) -> list[dict[str, Any]]:
    return [event for event in read_lines(paths.events) if event.get("event") == "submitted"]


def _prepare(plan: Plan, manifest: Manifest, diff: str) -> None:
    """Fill the run directory; the manifest comes last and says that all is there."""
    script = script_of(plan)
    write_atomic(plan.paths.config, to_yaml(plan.spec))
    write_atomic(plan.paths.script, script, mode=0o755)
    plan.paths.logs.mkdir()
    if diff:
        write_atomic(plan.paths.source_diff, diff)
    code = take_snapshot(plan.spec, plan.paths.code) if has_own_code(plan.spec) else None
    if code is not None and code.left_out:
        print(f"left out of the run's code, too large: {', '.join(code.left_out)}", file=sys.stderr)
    write_lockfile(plan.paths, plan.spec, manifest, code)
    write_manifest(plan.paths, manifest)


def _is_unfinished(plan: Plan) -> bool:
    """Whether the directory holds this run, on its way to the scheduler; RunStateError if it holds another."""
    paths = plan.paths
    begun = paths.manifest.is_file() and pending(paths) is not None
    if not begun and _has_jobs(paths):
        raise _exists(paths)
    if not begun:
        for entry in paths.root.iterdir():  # of a launcher that was killed before it asked for a job
            if entry.name != LOCK_FILE:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        return False
    if paths.config.read_text(encoding="utf-8") != to_yaml(plan.spec):
        raise RunStateError(
            f"the submission of run {paths.name} was interrupted, and this config is not the one it had; "
            f"finish it with `launcher resubmit {paths.name}`, or choose another name (name=...)"
        )
    return True


def _exists(paths: RunPaths) -> RunStateError:
    return RunStateError(
        f"run {paths.name} exists in {paths.root.parent}; "
        f"go on with `launcher resubmit {paths.name}`, or choose another name (name=...)"
    )


@contextlib.contextmanager
def _directory(paths: RunPaths) -> Iterator[None]:
    """The run directory, claimed; a body that fails and surely made no job leaves nothing new behind."""
    made = [folder for folder in (paths.root.parent, *paths.root.parent.parents) if not folder.exists()]
    if _is_foreign(paths.root):
        raise _exists(paths)
    with contextlib.ExitStack() as held:
        try:
            paths.root.parent.mkdir(parents=True, exist_ok=True)
            held.enter_context(claim(paths.root, create=True))
        except OSError as error:
            raise LauncherError(f"run_root: {paths.root} cannot be created: {error.strerror}") from None
        try:
            yield
        except BaseException:
            if not paths.submission.exists() and not _has_jobs(paths):
                shutil.rmtree(paths.root, ignore_errors=True)
                for folder in made:
                    with contextlib.suppress(OSError):
                        folder.rmdir()
            raise


def _is_foreign(root: Path) -> bool:
    """Whether something is at `root` that no launcher of ours made: a link, another user's, or a folder with files."""
    if not os.path.lexists(root):
        return False
    if root.is_symlink() or not root.is_dir() or root.stat().st_uid != os.getuid():
        return True
    return any(root.iterdir()) and not (root / LOCK_FILE).exists()


def _has_jobs(paths: RunPaths) -> bool:
    return paths.manifest.is_file() and bool(read_manifest(paths).attempts)


def summary(plan: Plan) -> str:
    """What will run, in numbers, and where each value that is not a default came from."""
    spec, topology = plan.spec, plan.topology
    resources = spec.resources
    device = f"{resources.gpus_per_node} GPUs" if resources.gpus_per_node else "CPU"
    chosen = " (topology: auto)" if "plan" in plan.config.sources.values() else ""
    lines = [
        f"run        {spec.name} on cluster {spec.cluster.name} ({spec.cluster.scheduler})",
        f"nodes      {resources.nodes} x {resources.ranks_per_node} ranks ({device})",
        f"topology   {topology.describe()}{chosen}",
        f"batch      {describe_batch(spec, topology)}",
        *_predicted(plan),
        *_kept_away_from(plan),
        f"directory  {plan.paths.root}",
        "values that are not defaults:",
    ]
    rows = [(key, _short(value), source) for key, value, source in plan.config.changed()]
    key_width = max(len(key) for key, _, _ in rows)
    value_width = max(len(value) for _, value, _ in rows)
    lines += [f"  {key:<{key_width}}  {value:<{value_width}}  ({source})" for key, value, source in rows]
    return "\n".join(lines)


def _kept_away_from(plan: Plan) -> list[str]:
    cluster = plan.spec.cluster
    if cluster.scheduler != "slurm":
        return []
    hosts = nodes.excluded(nodes.ledger_of(cluster).entries(), cluster.max_excluded)
    return [f"excluded   {', '.join(hosts)} (see `launcher nodes --cluster {cluster.name}`)"] if hosts else []


def _predicted(plan: Plan) -> list[str]:
    found = plan.prediction
    if found is None:
        return []
    speed = f"{found.time.total:.2f} s a step, {found.tokens_per_second:,.0f} tokens/s at most, {found.mfu:.0%} MFU"
    memory = f"{found.memory.total:.1f} of {found.memory.total - found.missing:.1f} GiB a GPU"
    cost = run_cost(plan.spec, found)
    return [f"predicted  {memory}; {speed}", *([f"cost       {cost.describe()}"] if cost else [])]


def _short(value: object, limit: int = 60) -> str:
    text = str(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def run_root_words(root: Path) -> str:
    """What a command must say to find the runs in `root`: nothing, where it looks there by itself."""
    return "" if root == default_run_root().absolute() else f" --run-root {shlex.quote(str(root))}"


def next_steps(plan: Plan, attempt: Attempt) -> str:
    """The job, and what to type now."""
    name, where = plan.paths.name, run_root_words(plan.paths.root.parent)
    what = "job" if attempt.scheduler == "slurm" else "process"
    return (
        f"submitted  {what} {attempt.job_id}, script {plan.paths.script}\n"
        f"next       launcher status {name}{where}\n"
        f"           launcher logs -f {name}{where}"
    )
