"""Submit a run to several clusters or partitions; the first of its jobs to start has it (launcher.contract.race)."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from launcher.contract import race, resources
from launcher.contract.arrival import arrival
from launcher.contract.config.cluster_file import load_cluster
from launcher.contract.errors import ConfigError, LauncherError, SchedulerError, did_you_mean
from launcher.contract.job import Job
from launcher.contract.manifest import describe_run, read_manifest
from launcher.contract.records import read_events
from launcher.contract.rundir import RUN_NAME, RunPaths, write_atomic
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec, sealed
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.cancel import cancel
from launcher.submission.directory import claimed_directory, is_unfinished
from launcher.submission.early_refusal import fetch_and_check
from launcher.submission.once import submit_once
from launcher.submission.script import script_of
from launcher.submission.secret_files import check_secrets, remove_secrets, write_secrets
from launcher.submission.submission import Submission, make_submission
from launcher.submission.submit import decide_request, fill_directory, record


def candidates(
    config: Path, overrides: Sequence[str], cluster: str | None, words: Sequence[str]
) -> tuple[Submission, ...]:
    """Return the run as it would be on each of the clusters or partitions, which have cluster files or have none.

    Raise ConfigError where they do not make the same run.
    """
    names = [word.strip() for word in words]
    bad = [name for name in names if re.fullmatch(RUN_NAME, name) is None]
    if bad or len(set(names)) < len(names) or len(names) < 2:
        raise ConfigError(f"--first-of {','.join(names)}: name two or more clusters or partitions, each once")
    known = {path.stem for folder in resources.search_path("cluster_configs") for path in folder.glob("*.yaml")}
    hosts = {name: load_cluster(name).host for name in names if name in known and arrival() is None}
    far = [
        f"--first-of {name}: it is reached by ssh to {host}, and all must be of one site"
        for name, host in hosts.items()
        if host
    ]
    if far:
        raise ConfigError(far)
    partitions = [name for name in names if name not in known]
    given = [word for word in overrides if word.startswith("resources.partition=")]
    if partitions and given:
        raise ConfigError(
            f"override {given[-1]!r}: --first-of names the partition {partitions[0]}; drop one of the two"
        )
    found = [
        make_submission(config, overrides, name)
        if name in known
        else make_submission(config, [*overrides, f"resources.partition={name}"], cluster)
        for name in names
    ]
    found = [dataclasses.replace(one, candidate=name) for one, name in zip(found, names, strict=True)]
    problems = [
        f"--first-of {one.candidate}: {_no_cluster(one.candidate, known)}{text}"
        for one in found
        if (text := _difference(found[0], one))
    ]
    if problems:
        raise ConfigError(problems)
    return tuple(found)


def _no_cluster(name: str, known: Collection[str]) -> str:
    """Return that a candidate is a partition where it is no cluster, which may have been meant."""
    return "" if name in known else f"no cluster has this name{did_you_mean(name, known)}; as a partition: "


def _difference(first: Submission, other: Submission) -> str | None:
    """Return why two candidates cannot race, or None."""
    spec, cluster = other.spec, other.spec.cluster
    if not CAPABILITIES[cluster.scheduler].allocates_nodes:
        return f"cluster {cluster.name} has no queue, so its job would always start first"
    if _run_of(spec, first.spec) != first.spec or spec.run_root != first.spec.run_root:
        return (
            f"its cluster file changes more of the run than {first.candidate}'s: only cluster and resources may differ"
        )
    if other.topology != first.topology:
        return f"its layout is {other.topology.describe()}, that of {first.candidate} {first.topology.describe()}"
    if spec.secret_names != first.spec.secret_names or cluster.secrets_dir != first.spec.cluster.secrets_dir:
        return f"env_from or cluster.secrets_dir are not those of {first.candidate}"
    return None


def _run_of(spec: RunSpec, of: RunSpec) -> RunSpec:
    return dataclasses.replace(spec, cluster=of.cluster, resources=of.resources)


def submit_first_of(
    race_of: Sequence[Submission], command: Sequence[str], parent_run: str | None = None
) -> dict[str, Job]:
    """Submit each candidate's job, or finish a submission that was interrupted, and return candidate to job.

    Once one has started no further one is submitted, and those that wait are cancelled, here or by the one that runs.
    """
    first = race_of[0]
    paths = first.paths
    check_secrets(first.spec)
    fetch_and_check(first.spec, first.config.fetches)
    with claimed_directory(paths):
        if not is_unfinished(first):
            _check_accepted(race_of)
            manifest, diff = describe_run(paths.name, first.topology, command, parent_run)
            for one in race_of:
                own = race.candidate_paths(paths, one.candidate)
                write_atomic(own.config, sealed(one.spec))
                write_atomic(own.script, script_of(one), mode=0o755)
            fill_directory(first, manifest, diff)
        try:
            _start(race_of)
        except LauncherError:
            if read_manifest(paths).jobs and race.winner(paths) is None:
                cancel([paths])
            raise
        _end_losers(paths)
    jobs = {job.id.text: job for job in read_manifest(paths).jobs}
    return {name: jobs[event["job_id"]] for name, event in race.entries(read_events(paths)).items()}


def _check_accepted(race_of: Sequence[Submission]) -> None:
    """Have the scheduler look at every candidate's script. Raise ConfigError with what it says of those it refuses."""
    problems = []
    for one in race_of:
        scheduler = scheduler_of(one.spec.cluster.scheduler)
        try:
            scheduler.expected_start(script_of(one), scheduler.clusters_of(one.spec.resources))
        except SchedulerError as error:
            problems.append(f"--first-of {one.candidate}: {error}")
    if problems:
        raise ConfigError(problems)


def _start(race_of: Sequence[Submission]) -> None:
    paths = race_of[0].paths
    name = read_manifest(paths).name
    begun = intent.pending(paths)
    if begun is not None:
        job = intent.find_job(paths, name, read_manifest(paths).jobs, begun)
        if job is not None:
            record(paths, job, begun.candidate)
        intent.end(paths)
    several = any(scheduler_of(one.spec.cluster.scheduler).clusters_of(one.spec.resources) for one in race_of)
    for one in race_of:
        if one.candidate not in race.entries(read_events(paths)) and race.winner(paths) is None:
            job = _submit(one, name)
            if several and not job.id.cluster:  # the winner may be on another cluster, and has to find this job
                here = scheduler_of(one.spec.cluster.scheduler).cluster_at_hand()
                job = dataclasses.replace(job, id=dataclasses.replace(job.id, cluster=here))
            record(paths, job, one.candidate)
            intent.end(paths)


def _submit(one: Submission, name: str) -> Job:
    paths, spec = one.paths, one.spec
    aside = paths.root / "submitit"
    aside.mkdir(exist_ok=True)
    recorded = read_manifest(paths).jobs
    scheduler = scheduler_of(spec.cluster.scheduler)
    request_of = decide_request(name, race.candidate_paths(paths, one.candidate).script, aside, spec, ())
    write_secrets(spec, paths)

    def undo() -> None:
        if not recorded:  # jobs of other candidates need the file
            remove_secrets(spec, paths)

    clusters = scheduler.clusters_of(spec.resources)
    return submit_once(paths, scheduler, recorded, clusters, request_of, undo, one.candidate)


def _end_losers(paths: RunPaths) -> None:
    """Cancel what was submitted while another candidate had started already."""
    won = race.winner(paths)
    if won is None:
        return
    entries: Mapping[str, Mapping[str, object]] = race.entries(read_events(paths))
    for name, event in entries.items():
        for job in read_manifest(paths).jobs:
            if name != won and job.id.is_job(event["job_id"], event.get("cluster", "")):
                scheduler_of(job.id.scheduler).cancel(job)
