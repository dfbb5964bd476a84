"""Submit a script so that it makes one job, whatever happens to this process or to the scheduler's answer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from launcher.contract.errors import SchedulerError
from launcher.contract.job import Job
from launcher.contract.rundir import RunPaths
from launcher.scheduler.base import Intent, JobRequest, Scheduler, SubmissionUnknown
from launcher.submission import intent


def submit_once(
    paths: RunPaths,
    scheduler: Scheduler,
    recorded: Sequence[Job],
    clusters: str,
    request_of: Callable[[Intent], JobRequest],
    undo: Callable[[], None],
    candidate: str = "",
) -> Job:
    """Submit and return the job. Where the answer leaves open whether there is one, look for it.

    `recorded` are the jobs that the run is known to have; `clusters` may get the new one, which is that of `candidate`
    in a race. Where there certainly is no
    job, the intent is removed and `undo` is called before the error is raised. Otherwise the intent stays, for the next
    call to find the job by.
    """
    begun = intent.begin(paths, scheduler.name, clusters, candidate)
    try:
        request = request_of(begun)
        return scheduler.submit(request)
    except SubmissionUnknown as error:
        print(f"{error}; asking {scheduler.title} what became of the job", file=sys.stderr)
        job = _find(paths, scheduler, recorded, request, error)
        if job is not None:
            return job
        refusal: BaseException = SchedulerError(
            f"{error}\n{scheduler.title} has no such job, so nothing was submitted; try again."
        )
    except BaseException as error:
        refusal = error
    intent.end(paths)
    undo()
    raise refusal from None


def _find(
    paths: RunPaths, scheduler: Scheduler, recorded: Sequence[Job], request: JobRequest, error: SubmissionUnknown
) -> Job | None:
    try:
        return intent.find_job(paths, request.name, recorded, request.intent)
    except SchedulerError as silence:
        raise SchedulerError(
            f"{error}\nThe job may be queued nevertheless, and {scheduler.title} cannot be asked now: {silence}\n"
            "Give the same command again later: it adopts the job if there is one, and submits it otherwise."
        ) from None
