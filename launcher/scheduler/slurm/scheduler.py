"""Slurm behind the `Scheduler` protocol."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence

from launcher.contract.errors import LauncherError, RunStateError, SchedulerError, did_you_mean
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.spec import ClusterSpec, ResourcesSpec
from launcher.contract.time_limit import time_limit_minutes
from launcher.scheduler.base import Allocation, Answer, Dependency, Intent, JobRecord, JobRequest, JobView, Scheduler
from launcher.scheduler.slurm import commands, queries
from launcher.scheduler.slurm.parsers import parse_job_view, parse_log
from launcher.scheduler.slurm.reasons import explained
from launcher.scheduler.slurm.states import from_slurm

_CLOCK_SKEW = 3600.0  # seconds: clocks differ, and a job may start before sbatch has answered
_CLAUSES = {"succeeded": "afterok", "ended": "afterany"}


class Slurm(Scheduler):
    """Batch jobs of the cluster whose login node this is, and of others of the site that Slurm's commands reach."""

    name = "slurm"
    title = "Slurm"
    submit_seconds = 70.0  # sbatch's time limit and the grace period of the `timeout` that enforces it
    settle_seconds = 10.0  # the controller's own message timeout, if unset

    def submit(self, request: JobRequest) -> Job:
        from launcher.scheduler.slurm.executor import ScriptSlurmExecutor  # submitit: only submitting needs it

        _check_same_cluster(request)
        script = request.script.read_text(encoding="utf-8")
        executor = ScriptSlurmExecutor(request.folder, script, submit_options(request), request.hidden)
        number = executor.submit_script()
        job_id = JobId(number, self.name, request.intent.token, executor.cluster)
        return Job(id=job_id, submitted_at=time.time())

    def find(self, name: str, intent: Intent, started: JobId | None) -> Job | None:
        if started is None:
            found = commands.find_job(intent.token, intent.written_at, intent.clusters)
            if found is None:
                return None
            started = JobId(found[0], self.name, cluster=found[1])
        job_id = dataclasses.replace(started, token=intent.token)
        return Job(id=job_id, submitted_at=intent.written_at, host=intent.host)

    def states(self, jobs: Sequence[Job], owners: Sequence[int], *, fresh: bool) -> Answer:
        records: dict[JobId, JobRecord] = {}
        problems, doubts = [], []
        for cluster in dict.fromkeys(job.id.cluster for job in jobs):
            here = {job.id: job.submitted_at for job in jobs if job.id.cluster == cluster}
            try:
                asked = {job_id.text: at for job_id, at in here.items()}
                found = queries.ask(asked, owners, fresh=fresh, cluster=_option(cluster))
            except SchedulerError as error:
                problems.append(str(error))
                continue
            known = [job_id for job_id in here if job_id.text in found.records]
            records |= {job_id: explained(found.records[job_id.text], job_id) for job_id in known}
            problems += [found.problem] if found.problem else []
            doubts += [found.doubt] if found.doubt else []
        return Answer(records=records, problem="\n".join(problems) or None, doubt="\n".join(doubts) or None)

    def allocations(self, jobs: Sequence[Job]) -> list[Allocation]:
        found = []
        for cluster in dict.fromkeys(job.id.cluster for job in jobs):
            here = {job.id.text: job for job in jobs if job.id.cluster == cluster}
            since = min(job.submitted_at for job in here.values())
            for use in commands.allocations(list(here), since, _option(cluster)):
                job = here.get(use.job_id)
                # Ids wrap around: what has another token, or began before this job was submitted, is another job.
                if job is None or use.start < job.submitted_at - _CLOCK_SKEW:
                    continue
                if not use.token or not job.id.token or use.token == job.id.token:
                    found.append(use.of(job.id))
        return sorted(found, key=lambda use: use.start)

    def cancel(self, job: Job) -> None:
        commands.cancel(job.id.text, _option(job.id.cluster))
        queries.forget()

    def clusters_of(self, resources: ResourcesSpec) -> str:
        given = _given(resources, "--clusters=")
        return given[0] if given else os.environ.get("SBATCH_CLUSTERS") or os.environ.get("SLURM_CLUSTERS") or ""

    def cluster_at_hand(self) -> str:
        return commands.local_cluster()

    def go_on_as(self, old: JobId, new: JobId) -> None:
        if _option(old.cluster) or _option(new.cluster):
            return  # scontrol changes jobs of the cluster at hand only
        for waiting, clauses in commands.dependents(old.text).items():
            commands.wait_for(waiting, clauses, old.text, new.text)

    def host_names(self, hosts: str) -> list[str]:
        return commands.host_names(hosts)

    def unknown_nodes(self, hosts: Sequence[str], clusters: str = "") -> list[str]:
        known = set(commands.node_names(clusters))
        return [host for host in hosts if host not in known]

    def expected_start(self, script: str, clusters: str = "") -> str:
        return commands.expected_start(script, clusters)

    def array_elements(self, job: Job, size: int) -> list[Job]:
        elements = [dataclasses.replace(job.id, text=f"{job.id}_{number}") for number in range(size)]
        return [dataclasses.replace(job, id=element) for element in elements]

    def max_array_size(self) -> int:
        return commands.max_array_size()

    def job_limits(self) -> dict[str, int]:
        return commands.job_limits()

    def cluster_problems(self, cluster: ClusterSpec, wanted: ResourcesSpec, script: Callable[[], str]) -> Iterator[str]:
        try:
            partitions = {partition.name: partition for partition in commands.partitions()}
            has_pyxis = "--container-image" in commands.srun_help()
        except SchedulerError as error:
            yield f"scheduler: {error}"
            return
        if cluster.runtime.kind == "pyxis" and not has_pyxis:
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
        try:
            commands.expected_start(script())
        except LauncherError as error:
            yield f"sbatch --test-only: {error}"

    def beside(
        self, job: Job, hosts: Sequence[str], options: Sequence[str] = (), *, terminal: bool = False
    ) -> list[str]:
        if _option(job.id.cluster):
            where = f"job {job.id.text} is on cluster {job.id.cluster}"
            raise RunStateError(f"{where}, and steps are started from a login node of that cluster")
        return commands.overlapping_step(job.id.text, hosts, options, terminal=terminal)

    def read_state(self, text: str) -> JobState:
        return from_slurm(text)

    def read_view(self, text: str) -> JobView | None:
        return parse_job_view(text)

    def read_log(self, text: str) -> tuple[JobState, str] | None:
        return parse_log(text)


def submit_options(request: JobRequest) -> list[str]:
    """Return sbatch's options for a submission.

    An option on the command line replaces the script's own, so what the user has given in `resources` is repeated.
    """
    comment = [*_given(request.resources, "--comment="), request.intent.token]
    clauses = [_clause(dependency) for dependency in request.waits_for]
    options = [f"--comment={' '.join(comment)}"]
    if request.intent.clusters:
        options.append(f"--clusters={request.intent.clusters}")
    if request.exclude:
        options.append(f"--exclude={request.exclude}")
    if clauses:
        options.append(f"--dependency={','.join([*_given(request.resources, '--dependency='), *clauses])}")
    if request.array is not None:
        throttle = f"%{request.array.at_once}" if request.array.at_once is not None else ""
        options.append(f"--array=0-{request.array.size - 1}{throttle}")
    return options


def _given(resources: ResourcesSpec, prefix: str) -> list[str]:
    """Return the value that the user has given for an option, in a list. The last one counts, as for sbatch."""
    return [option.removeprefix(prefix) for option in resources.extra_sbatch if option.startswith(prefix)][-1:]


def _clause(dependency: Dependency) -> str:
    return f"{_CLAUSES[dependency.when]}:{dependency.job.text}"


def _option(cluster: str) -> str:
    """Return the value of --clusters for jobs of a cluster: none for the one at hand, where it would need slurmdbd."""
    return "" if not cluster or cluster == commands.local_cluster() else cluster


def _check_same_cluster(request: JobRequest) -> None:
    """Raise RunStateError where a job of another cluster is to be waited for, which Slurm cannot."""
    wanted = _option(request.intent.clusters)
    for dependency in request.waits_for:
        if _option(dependency.job.cluster) != wanted:
            where = dependency.job.cluster or commands.local_cluster()
            raise RunStateError(
                f"job {dependency.job.text} is on cluster {where}, and jobs of cluster "
                f"{wanted or commands.local_cluster()} cannot wait for it; submit to {where} (--clusters), or later"
            )
