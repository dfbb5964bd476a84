"""Create the run directory, submit its script and record the job; what fails before that leaves nothing behind."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.contract import race
from launcher.contract.errors import RunStateError, SchedulerError
from launcher.contract.job import Job, job_fields
from launcher.contract.manifest import Manifest, describe_run, read_manifest, write_manifest
from launcher.contract.records import read_events
from launcher.contract.rundir import RunPaths, append_event, write_atomic
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec, sealed
from launcher.runs import excluded_nodes
from launcher.runs.find import all_runs
from launcher.scheduler.base import Array, Dependency, Intent, JobRequest
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.after import dependency_on_parent
from launcher.submission.code_snapshot import has_own_code, take_snapshot
from launcher.submission.directory import claimed_directory, is_unfinished
from launcher.submission.early_refusal import fetch_and_check
from launcher.submission.lockfile import write_lockfile
from launcher.submission.once import submit_once
from launcher.submission.script import script_of
from launcher.submission.secret_files import check_secrets, remove_secrets, write_secrets
from launcher.submission.submission import Submission
from launcher.submission.unchanged import check_unchanged, digests


def submit(
    submission: Submission,
    command: Sequence[str],
    parent_run: str | None = None,
    group: str | None = None,
    waits_for: Sequence[Dependency] = (),
) -> Job:
    """Start a new run and return its job, or finish the submission of this very run that was interrupted.

    Killed at any point and called again, it makes one job: the files say how far the first call came.
    """
    check_secrets(submission.spec)
    fetch_and_check(submission.spec, submission.config.fetches)
    with claimed_directory(submission.paths):
        if not is_unfinished(submission):
            manifest, diff = describe_run(submission.paths.name, submission.topology, command, parent_run)
            fill_directory(submission, dataclasses.replace(manifest, group=group), diff)
        return start(submission.paths, submission.spec, waits_for)


def prepare(submission: Submission, command: Sequence[str], group: str) -> None:
    """Make the run's directory, for a job that is submitted together with those of other runs."""
    fetch_and_check(submission.spec, submission.config.fetches)
    with claimed_directory(submission.paths):
        if is_unfinished(submission):
            raise RunStateError(
                f"the submission of run {submission.paths.name} was interrupted; finish or cancel it first"
            )
        manifest, diff = describe_run(submission.paths.name, submission.topology, command, None)
        fill_directory(submission, dataclasses.replace(manifest, group=group), diff)


def start(paths: RunPaths, spec: RunSpec, waits_for: Sequence[Dependency] = ()) -> Job:
    """Submit the run's script and return its job, unless a submission that was begun before has made one already.

    The caller holds the claim of the run's directory.
    """
    manifest = read_manifest(paths)
    begun = intent.pending(paths)
    job = intent.find_job(paths, manifest.name, manifest.jobs, begun) if begun is not None else None
    if job is None:
        check_unchanged(paths, manifest.digests)
        aside = paths.root / "submitit"
        aside.mkdir(exist_ok=True)
        request_of = decide_request(manifest.name, race.script_of(paths), aside, spec, waits_for)
        write_secrets(spec, paths)
        scheduler = scheduler_of(spec.cluster.scheduler)
        clusters = scheduler.clusters_of(spec.resources)
        job = submit_once(paths, scheduler, manifest.jobs, clusters, request_of, lambda: remove_secrets(spec, paths))
    record(paths, job, begun.candidate if begun is not None else "")
    intent.end(paths)
    return job


def decide_request(
    name: str, script: Path, folder: Path, spec: RunSpec, waits_for: Sequence[Dependency], array: Array | None = None
) -> Callable[[Intent], JobRequest]:
    """Decide which jobs to wait for and which nodes to exclude, and return the request for a given intent.

    Raise ConfigError, RunStateError or SchedulerError where the run cannot wait for its parent.
    """
    on_parent = dependency_on_parent(spec)
    dependencies = (*([on_parent] if on_parent is not None else []), *waits_for)
    exclude = _nodes_to_exclude(spec)

    def request_of(begun: Intent) -> JobRequest:
        return JobRequest(
            name=name,
            script=script,
            folder=folder,
            intent=begun,
            resources=spec.resources,
            hidden=spec.secret_names,
            waits_for=dependencies,
            exclude=exclude,
            array=array,
        )

    return request_of


def record(paths: RunPaths, job: Job, candidate: str = "") -> None:
    """Add a job, of a race that of `candidate`, to the run's manifest and events, unless it is there."""
    manifest = read_manifest(paths)
    if job.id not in [known.id for known in manifest.jobs]:
        write_manifest(paths, manifest.with_job(job))
    submitted = (event for event in read_events(paths) if event.get("event") == "submitted")
    if not any(job.id.is_job(event.get("job_id"), event.get("cluster")) for event in submitted):
        of_race = {"candidate": candidate} if candidate else {}
        append_event(paths, "submitted", **job_fields(job.id), scheduler=job.id.scheduler, **of_race)


def _nodes_to_exclude(spec: RunSpec) -> str | None:
    """Return the nodes to keep away from, those of the config included, or None where none are known."""
    if not CAPABILITIES[spec.cluster.scheduler].allocates_nodes:
        return None
    excluded_nodes.learn(all_runs(Path(spec.run_root)), spec.cluster)
    unknown = _unknown(excluded_nodes.hosts_to_exclude(spec.cluster), spec)
    if unknown:
        forget = f"launcher nodes clear NODE --cluster {spec.cluster.name}"
        print(f"not excluded, since the cluster has no such node: {', '.join(unknown)} (`{forget}`)", file=sys.stderr)
    return excluded_nodes.exclude_option(spec.cluster, spec.resources.exclude, unknown)


def _unknown(hosts: Sequence[str], spec: RunSpec) -> list[str]:
    """Return those of the hosts that the scheduler has no node of, as far as it answers."""
    scheduler = scheduler_of(spec.cluster.scheduler)
    with contextlib.suppress(SchedulerError):
        return scheduler.unknown_nodes(hosts, scheduler.clusters_of(spec.resources)) if hosts else []
    return []


def fill_directory(submission: Submission, manifest: Manifest, diff: str) -> None:
    """Write the files of a new run. The manifest comes last: it says that all of them are there."""
    script = script_of(submission)
    manifest = dataclasses.replace(manifest, given_resources=submission.config.given_resources)
    write_atomic(submission.paths.config, sealed(submission.spec))
    write_atomic(submission.paths.script, script, mode=0o755)
    submission.paths.logs.mkdir()
    if diff:
        write_atomic(submission.paths.source_diff, diff)
    code = take_snapshot(submission.spec, submission.paths.code) if has_own_code(submission.spec) else None
    if code is not None and code.left_out:
        print(
            f"left out of the run's code, too large or without a name in UTF-8: {', '.join(code.left_out)}",
            file=sys.stderr,
        )
    write_lockfile(submission.paths, submission.spec, manifest, code)
    write_manifest(submission.paths, dataclasses.replace(manifest, digests=digests(submission.paths)))
