"""Runs as processes of this machine, behind the `Scheduler` protocol.

A job is the controller's process. Its id alone is reused; with the start time that the kernel keeps it is not. Where
the controller was killed, the job is what it left in its session: the batch script goes on without it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Sequence

from launcher.contract import processes
from launcher.contract.errors import RunStateError
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.scheduler.base import Answer, Intent, JobRecord, JobRequest, Scheduler

_TERM_SECONDS = 60.0
_KILL_SECONDS = 10.0


class Local(Scheduler):
    """Processes of this machine; nothing is queued, and nothing outlives a reboot."""

    name = "local"
    title = "this machine"
    noun = "process"

    def submit(self, request: JobRequest) -> Job:
        from launcher.scheduler.local_controller import ScriptLocalExecutor  # submitit: only submitting needs it

        resources, token = request.resources, request.intent.token
        executor = ScriptLocalExecutor(request.folder, resources.time, resources.signal_seconds, token)
        return self._job(int(executor.submit_script(request.script)), token, time.time())

    def find(self, name: str, intent: Intent, started: JobId | None) -> Job | None:
        if intent.host != socket.gethostname():
            raise RunStateError(f"run {name} was being started on {intent.host}; run this command there")
        leaders = [pid for pid in processes.with_text(intent.token) if processes.is_session_leader(pid)]
        if leaders:
            controller = min(leaders, key=lambda pid: processes.start_ticks(pid) or 0)
            return self._job(controller, intent.token, intent.written_at)
        if started is None:
            return None
        gone = JobId(started.text, self.name, intent.token)  # a process of this id may be another one by now
        return Job(id=gone, submitted_at=intent.written_at, host=intent.host)

    def states(self, jobs: Sequence[Job], owners: Sequence[int], *, fresh: bool) -> Answer:
        return Answer(records={job.id: _record(job) for job in jobs})

    def cancel(self, job: Job) -> None:
        """Send TERM to the controller, which passes it on to the ranks, and after a while KILL to the whole session."""
        for number, patience in ((signal.SIGTERM, _TERM_SECONDS), (signal.SIGKILL, _KILL_SECONDS)):
            heads = _heads(job)
            if not heads:
                return
            for pid in heads:
                with contextlib.suppress(ProcessLookupError):
                    if number is signal.SIGTERM:
                        os.kill(pid, number)
                    else:
                        os.killpg(os.getpgid(pid), number)
            deadline = time.monotonic() + patience
            while _heads(job) and time.monotonic() < deadline:
                time.sleep(0.05)

    def expected_start(self, script: str, clusters: str = "") -> str:
        return "at once, on this machine"

    def beside(
        self, job: Job, hosts: Sequence[str], options: Sequence[str] = (), *, terminal: bool = False
    ) -> list[str]:
        return []  # `states` has seen that the ranks are on this machine

    def _job(self, pid: int, token: str, submitted_at: float) -> Job:
        return Job(
            id=JobId(str(pid), self.name, token),
            submitted_at=submitted_at,
            host=socket.gethostname(),
            process_start=processes.start_ticks(pid),
        )


def _record(job: Job) -> JobRecord:
    state, reason = _state(job)
    return JobRecord(job_id=job.id.text, state=state, reason=reason)


def _state(job: Job) -> tuple[JobState, str]:
    if not job.host:
        return JobState.UNKNOWN, "started by hand, and not ended"
    if job.host != socket.gethostname():
        return JobState.UNKNOWN, f"it runs on {job.host}; look there"
    if _heads(job):
        return JobState.RUNNING, ""
    return JobState.FAILED, f"process {job.id} is gone and did not record how it ended"


def _heads(job: Job) -> list[int]:
    """Return the processes that pass signals on to the others of a job: its controller or, without it, its script."""
    if _is_alive(job):
        return [int(job.id.text)]
    if not job.id.token:
        return []
    left = {pid for pid in processes.with_text(job.id.token) if processes.session(pid) == int(job.id.text)}
    return sorted(pid for pid in left if processes.parent(pid) not in left)


def _is_alive(job: Job) -> bool:
    return job.process_start is not None and processes.start_ticks(int(job.id.text)) == job.process_start
