"""The runs of a sweep as job arrays: one sbatch for as many runs as the cluster allows in an array.

Each element is a run with a directory, a config and a script of its own; the array's script only picks one by
SLURM_ARRAY_TASK_ID. An array is submitted like a run: written down with a token first, and found by it again after a
kill. Rejected: submitit's own arrays, which build their executor by its class's name and lose ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.manifest import Attempt
from launcher.contract.rundir import RunPaths, read_json, write_atomic, write_json
from launcher.contract.spec import to_yaml
from launcher.scheduler import slurm
from launcher.submission.claim import claim
from launcher.submission.intent import begin, end, find, pending
from launcher.submission.plan import Plan
from launcher.submission.render import directives_of, render_array
from launcher.submission.secret_files import check_secrets, write_secrets
from launcher.submission.submit import job_options, prepare, record, script_of
from launcher.sweeps.groups import Group


def submit_arrays(group: Group, plans: Sequence[Plan], max_at_once: int | None, command: Sequence[str]) -> list[str]:
    """Submit all runs as arrays; the job ids of their elements. Called again after an interruption it goes on."""
    check_secrets(plans[0].spec)
    size = slurm.max_array_size()
    jobs: list[str] = []
    before: Attempt | None = None
    for first in range(0, len(plans), size):
        part = plans[first : first + size]
        array = _Array(RunPaths(group.file.with_suffix("") / f"array-{first}"), group.name, part, max_at_once)
        before = array.submit(command, [f"afterany:{before.job_id}"] if before and max_at_once else [])
        jobs += [f"{before.job_id}_{number}" for number in range(len(part))]
    return jobs


def check_alike(plans: Sequence[Plan]) -> None:
    """ConfigError where elements would ask Slurm for different things: an array asks once."""
    asked = [directives_of(script_of(plan)) for plan in plans]
    for plan, lines in zip(plans, asked, strict=True):
        if lines != asked[0]:
            differences = ", ".join(sorted(set(lines) ^ set(asked[0])))
            raise ConfigError(
                f"sweep.as: array: {plan.paths.name} and {plans[0].paths.name} ask for different things "
                f"({differences}); use `as: runs`"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class _Array:
    """One array, with a folder of its own."""

    paths: RunPaths
    name: str
    plans: Sequence[Plan]
    max_at_once: int | None

    @property
    def job_file(self) -> Path:
        return self.paths.root / "job.json"

    def submit(self, command: Sequence[str], waits_for: Sequence[str]) -> Attempt:
        self.paths.root.parent.mkdir(parents=True, exist_ok=True)
        with claim(self.paths.root, create=True):
            attempt = self.known()
            if attempt is None:
                if pending(self.paths) is None:  # else all was prepared before
                    for plan in self.plans:
                        prepare(plan, command, self.name)
                attempt = self.send(waits_for)
            write_json(self.job_file, dataclasses.asdict(attempt))
            for number, plan in enumerate(self.plans):
                record(plan.paths, dataclasses.replace(attempt, job_id=f"{attempt.job_id}_{number}"))
            end(self.paths)
        return attempt

    def known(self) -> Attempt | None:
        """The job of an earlier call that came this far."""
        values, intent = read_json(self.job_file), pending(self.paths)
        attempt = Attempt(**values) if values else find(self.paths, self.name, (), intent) if intent else None
        if attempt is not None and any(plan.paths.config.read_text() != to_yaml(plan.spec) for plan in self.plans):
            raise RunStateError(f"sweep {self.name} is submitted with another config; choose another name (name=...)")
        return attempt

    def send(self, waits_for: Sequence[str]) -> Attempt:
        """Call sbatch; what fails for certain is forgotten, so that it may be tried again."""
        from launcher.submission.executor import ScriptSlurmExecutor, SubmissionUnknown

        spec = self.plans[0].spec
        runs = [plan.paths.root for plan in self.plans]
        script = render_array(self.name, directives_of(script_of(self.plans[0])), self.paths.root, runs)
        write_atomic(self.paths.script, script, mode=0o755)
        for plan in self.plans:
            write_secrets(plan.spec, plan.paths)
        throttle = f"%{self.max_at_once}" if self.max_at_once is not None else ""
        options = job_options(spec, waits_for)
        intent = begin(self.paths, "slurm")
        options += [f"--array=0-{len(runs) - 1}{throttle}", f"--comment={intent.token}"]
        try:
            job_id = ScriptSlurmExecutor(self.paths.root, script, options, spec.secret_names).submit_script()
        except SubmissionUnknown as error:
            attempt = find(self.paths, self.name, (), intent)
            if attempt is not None:
                return attempt
            end(self.paths)
            raise SchedulerError(f"{error}\nSlurm has no such job, so nothing was submitted; try again.") from None
        except BaseException:
            end(self.paths)
            raise
        return Attempt(job_id=job_id, scheduler="slurm", submitted_at=intent.written_at, token=intent.token)
