"""`after: RUN`: a job that starts when another run has succeeded, or is refused where that can no longer happen.

Slurm waits for jobs and knows no runs, so the dependency is made out at each submission from what the parent is then:
finished, there is nothing to wait for; at work, its present job is named; ended otherwise, the run is refused, which
beats a job that is queued for ever.
"""

from __future__ import annotations

from collections.abc import Sequence

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.spec import RunSpec
from launcher.runs.find import find_run
from launcher.runs.state import collect


def dependency_option(spec: RunSpec, others: Sequence[str] = ()) -> list[str]:
    """sbatch's option for what the run waits for: `after`, these clauses, and those the user has given."""
    prefix = "--dependency="
    given = [word.removeprefix(prefix) for word in spec.resources.extra_sbatch if word.startswith(prefix)]
    clauses = [*_after_clause(spec), *others]
    return [prefix + ",".join([*given[-1:], *clauses])] if clauses else []


def _after_clause(spec: RunSpec) -> list[str]:
    if spec.after is None or spec.after_directory is None:
        return []
    parent = find_run(str(spec.after_directory), spec.after_directory.parent)
    (status,), problem = collect([parent], fresh=True)
    if status.state is JobState.COMPLETED:
        return []
    if status.state is JobState.UNKNOWN:
        raise SchedulerError(f"after: cannot tell whether run {spec.after} will succeed: {problem or status.reason}")
    if status.state.terminal:
        raise RunStateError(
            f"after: run {spec.after} is {status.state.value}, so this one would wait for ever; "
            f"`launcher resubmit {spec.after}` first"
        )
    if spec.cluster.scheduler != "slurm" or status.scheduler != "slurm":
        raise ConfigError(
            f"after: run {spec.after} is {status.state.value}, and only Slurm waits; submit when it is done"
        )
    return [f"afterok:{status.job}"]
