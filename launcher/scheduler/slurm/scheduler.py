"""Slurm behind the `Scheduler` protocol."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence

from launcher.contract.errors import LauncherError, SchedulerError, did_you_mean
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.spec import ClusterSpec, ResourcesSpec
from launcher.scheduler.base import Answer, Dependency, Intent, JobRecord, JobRequest, JobView, Scheduler
from launcher.scheduler.slurm import commands, queries
from launcher.scheduler.slurm.parsers import parse_job_view, parse_log
from launcher.scheduler.slurm.states import from_slurm
from launcher.scheduler.time_limit import time_limit_minutes

_ADVICE = {
    "DependencyNeverSatisfied": "DependencyNeverSatisfied: it will never start; cancel it",
    "BeginTime": "BeginTime: Slurm waits a while before it starts a requeued job again",
}
_CLAUSES = {"succeeded": "afterok", "ended": "afterany"}


class Slurm(Scheduler):
    """Batch jobs of the cluster whose login node this is."""

    name = "slurm"
    title = "Slurm"
    submit_seconds = 70.0  # sbatch's time limit and the grace period of the `timeout` that enforces it
    settle_seconds = 10.0  # the controller's own message timeout, if unset

    def submit(self, request: JobRequest) -> Job:
        from launcher.scheduler.slurm.executor import ScriptSlurmExecutor  # submitit: only submitting needs it

        script = request.script.read_text(encoding="utf-8")
        executor = ScriptSlurmExecutor(request.folder, script, submit_options(request), request.hidden)
        job_id = JobId(executor.submit_script(), self.name, request.intent.token)
        return Job(id=job_id, submitted_at=time.time())

    def find(self, name: str, intent: Intent, started: str | None) -> Job | None:
        job_id = started or commands.find_job(name, intent.token, intent.written_at)
        if job_id is None:
            return None
        return Job(id=JobId(job_id, self.name, intent.token), submitted_at=intent.written_at, host=intent.host)

    def states(self, jobs: Sequence[Job], owners: Sequence[int], *, fresh: bool) -> Answer:
        answer = queries.ask({job.id.text: job.submitted_at for job in jobs}, owners, fresh=fresh)
        known = [answer.records[job.id.text] for job in jobs if job.id.text in answer.records]
        return dataclasses.replace(answer, records={record.job_id: _explained(record) for record in known})

    def cancel(self, job: Job) -> None:
        commands.cancel([job.id.text])
        queries.forget()

    def expected_start(self, script: str) -> str:
        return commands.expected_start(script)

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
    return f"{_CLAUSES[dependency.when]}:{dependency.job}"


def _explained(record: JobRecord) -> JobRecord:
    """Return the record with what to do about Slurm's reason, where people ask about it."""
    if record.state is JobState.HELD:
        reason = f"{record.reason}: waits for `scontrol release {record.job_id}`"
    elif record.state in (JobState.COMPLETED, JobState.CANCELLED):
        reason = ""  # squeue goes on showing why the job once waited
    else:
        reason = _ADVICE.get(record.reason, record.reason)
    return dataclasses.replace(record, reason=reason)
