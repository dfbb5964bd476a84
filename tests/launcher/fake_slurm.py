"""A fake Slurm: tests queue, start, end, forget and account for jobs, and count the questions that are asked.

squeue and sacct are programs on PATH that answer like the real ones; `tests/slurm/test_queries.py` compares them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from tests.launcher.conftest import Commands

_SQUEUE = """\
sleep {latency}
cat {folder}/queue
"""
_SACCT = """\
for word in "$@"; do case $word in --jobs=*) jobs=,${{word#--jobs=}}, ;; esac; done
echo 'JobID|State|ExitCode|Start|JobName'
while IFS= read -r line; do
  id=${{line%%|*}}
  [[ $jobs == *",${{id%%_*}},"* || $jobs == *",$id,"* ]] && echo "$line"
done <{folder}/accounts
exit 0
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class FakeJob:
    """One job of the controller."""

    name: str
    state: str = "PENDING"
    reason: str = "Priority"
    start: str = "N/A"
    exit_code: str = "0:0"
    in_queue: bool = True


class FakeSlurm:
    """The controller's and the accounting's books."""

    def __init__(self, commands: Commands, *, latency: float = 0.0) -> None:
        self._commands = commands
        self.jobs: dict[str, FakeJob] = {}
        commands.add("squeue", _SQUEUE.format(folder=commands.folder, latency=latency))
        commands.add("sacct", _SACCT.format(folder=commands.folder))
        self._write()

    def submit(self, *names: str, first: int = 1) -> list[str]:
        """Queue one job for each name; their ids count from `first`."""
        ids = [str(first + number) for number in range(len(names))]
        self.jobs.update({job: FakeJob(name=name) for job, name in zip(ids, names, strict=True)})
        self._write()
        return ids

    def start(self, *jobs: str) -> None:
        self._change(jobs, state="RUNNING", reason="None", start="2026-01-01T00:00:00")

    def end(self, *jobs: str, state: str = "COMPLETED", exit_code: str = "0:0") -> None:
        self._change(jobs, state=state, reason="None", exit_code=exit_code)

    def requeue(self, *jobs: str) -> None:
        self._change(jobs, state="PENDING", reason="BeginTime", start="N/A", in_queue=True)

    def forget(self, *jobs: str) -> None:
        """Let MinJobAge go by: from now on only sacct knows the jobs."""
        self._change(jobs, in_queue=False)

    @property
    def questions(self) -> int:
        """How often anything was asked."""
        return len(self._commands.calls("squeue")) + len(self._commands.calls("sacct"))

    def _change(self, jobs: tuple[str, ...], **changes: str | bool) -> None:
        for job in jobs:
            self.jobs[job] = dataclasses.replace(self.jobs[job], **changes)  # type: ignore[arg-type]
        self._write()

    def _write(self) -> None:
        queue, accounts = [], []
        for number, job in self.jobs.items():
            if job.in_queue:
                queue.append(f"{number}|{job.state}|{job.reason} [(null)]|{job.start}|{job.name}|(null)\n")
            began = job.start.replace("N/A", "Unknown")
            accounts.append(f"{number}|{job.state}|{job.exit_code}|{began}|{job.name}\n")
        (self._commands.folder / "queue").write_text("".join(queue))
        (self._commands.folder / "accounts").write_text("".join(accounts))
