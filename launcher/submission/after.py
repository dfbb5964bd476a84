"""`after: RUN`: a job that starts when another run has succeeded, or is refused where that can no longer happen.

Schedulers wait for jobs and know no runs, so the dependency is worked out at each submission from the parent's state:
if it has finished, there is nothing to wait for; if it is at work, its present job is named; otherwise the run is
refused, which is better than a job that is queued for ever.
"""

from __future__ import annotations

from launcher.contract.errors import ConfigError, RunStateError, SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.schedulers import CAPABILITIES
from launcher.contract.spec import RunSpec
from launcher.runs.find import find_run
from launcher.runs.state import collect
from launcher.scheduler.base import Dependency


def dependency_on_parent(spec: RunSpec) -> Dependency | None:
    """Return what the run's `after` has it wait for, or None where there is nothing to wait for.

    ConfigError, RunStateError or SchedulerError where the run cannot wait for its parent.
    """
    if spec.after is None or spec.after_directory is None:
        return None
    parent = find_run(str(spec.after_directory), spec.after_directory.parent)
    (status,), problem = collect([parent], fresh=True)
    if status.state is JobState.COMPLETED:
        return None
    if status.state is JobState.UNKNOWN or status.job_id is None:
        raise SchedulerError(f"after: cannot tell whether run {spec.after} will succeed: {problem or status.reason}")
    if status.state.terminal:
        raise RunStateError(
            f"after: run {spec.after} is {status.state.value}, so this one would wait for ever; "
            f"`launcher resubmit {spec.after}` first"
        )
    scheduler = status.job_id.scheduler
    if not CAPABILITIES[scheduler].dependencies or spec.cluster.scheduler != scheduler:
        raise ConfigError(
            f"after: run {spec.after} is {status.state.value}, and jobs of scheduler {spec.cluster.scheduler} cannot "
            f"wait for jobs of scheduler {scheduler}; submit when it is done"
        )
    return Dependency(job=status.job_id, when="succeeded")
