"""The runs of a sweep as job arrays: one submission for as many runs as the cluster allows in an array.

Each element is a run with a directory, a config and a script of its own; the array's script only selects one by
SLURM_ARRAY_TASK_ID. An array is submitted like a run: written down with a token first, and found by it again after a
kill. Rejected: submitit's own arrays, which build their executor by its class's name and lose ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError
from launcher.contract.job import Job
from launcher.contract.rundir import RunPaths, read_json, write_atomic, write_json
from launcher.contract.spec import is_config_of
from launcher.scheduler.base import Array, Dependency, Scheduler
from launcher.scheduler.factory import scheduler_of
from launcher.submission import intent
from launcher.submission.claim import claim
from launcher.submission.once import submit_once
from launcher.submission.render_script import directives_of, render_array
from launcher.submission.script import script_of
from launcher.submission.secret_files import check_secrets, remove_secrets, write_secrets
from launcher.submission.submission import Submission
from launcher.submission.submit import decide_request, prepare, record
from launcher.sweeps.groups import Group


def submit_arrays(
    group: Group, submissions: Sequence[Submission], max_at_once: int | None, command: Sequence[str]
) -> list[Job]:
    """Submit all runs as arrays and return the jobs of the runs. Called again after an interruption it goes on."""
    for submission in submissions:
        check_secrets(submission.spec)
    scheduler = scheduler_of(submissions[0].spec.cluster.scheduler)
    size = scheduler.max_array_size()
    jobs: list[Job] = []
    before: Job | None = None
    for first in range(0, len(submissions), size):
        part = submissions[first : first + size]
        folder = RunPaths(group.file.with_suffix("") / f"array-{first}")
        array = _Array(scheduler, folder, group.name, part, max_at_once)
        waits_for = [Dependency(job=before.id, when="ended")] if before and max_at_once else []
        before = array.submit(command, waits_for)
        jobs += scheduler.array_elements(before, len(part))
    return jobs


def check_alike(submissions: Sequence[Submission]) -> None:
    """Raise ConfigError where runs ask the scheduler for different things: an array asks once for all."""
    asked = [directives_of(script_of(submission)) for submission in submissions]
    for submission, lines in zip(submissions, asked, strict=True):
        if lines != asked[0]:
            differences = ", ".join(sorted(set(lines) ^ set(asked[0])))
            raise ConfigError(
                f"sweep.as: array: {submission.paths.name} and {submissions[0].paths.name} ask for different things "
                f"({differences}); use `as: runs`"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _Array:
    """One array, with a folder of its own."""

    scheduler: Scheduler
    paths: RunPaths
    name: str
    submissions: Sequence[Submission]
    max_at_once: int | None

    @property
    def job_file(self) -> Path:
        return self.paths.root / "job.json"

    def submit(self, command: Sequence[str], waits_for: Sequence[Dependency]) -> Job:
        self.paths.root.parent.mkdir(parents=True, exist_ok=True)
        with claim(self.paths.root, create=True):
            job = self.known()
            if job is None:
                if intent.pending(self.paths) is None:  # otherwise an earlier call has prepared all of it
                    for submission in self.submissions:
                        prepare(submission, command, self.name)
                job = self.send(waits_for)
            write_json(self.job_file, job.as_json())
            for submission, element in zip(
                self.submissions, self.scheduler.array_elements(job, len(self.submissions)), strict=True
            ):
                record(submission.paths, element)
            intent.end(self.paths)
        return job

    def known(self) -> Job | None:
        """Return the job that an earlier call has made."""
        values, begun = read_json(self.job_file), intent.pending(self.paths)
        job = Job.from_json(values) if values else None
        if job is None and begun is not None:
            job = intent.find_job(self.paths, self.name, (), begun)
        if job is not None and any(
            not is_config_of(submission.paths.config, submission.spec) for submission in self.submissions
        ):
            raise RunStateError(f"sweep {self.name} is submitted with another config; choose another name (name=...)")
        return job

    def send(self, waits_for: Sequence[Dependency]) -> Job:
        """Write the array's script and submit it."""
        spec, runs = self.submissions[0].spec, [submission.paths.root for submission in self.submissions]
        script = render_array(self.name, directives_of(script_of(self.submissions[0])), self.paths.root, runs)
        write_atomic(self.paths.script, script, mode=0o755)
        array = Array(size=len(runs), at_once=self.max_at_once)
        request_of = decide_request(self.name, self.paths.script, self.paths.root, spec, waits_for, array)
        for submission in self.submissions:
            write_secrets(submission.spec, submission.paths)
        clusters = self.scheduler.clusters_of(spec.resources)
        return submit_once(self.paths, self.scheduler, (), clusters, request_of, self.remove_secrets)

    def remove_secrets(self) -> None:
        for submission in self.submissions:
            remove_secrets(submission.spec, submission.paths)
