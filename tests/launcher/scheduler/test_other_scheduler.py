"""Commands over a scheduler of a few lines, on a machine without Slurm: nothing but the protocol is asked."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.errors import SchedulerError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.manifest import read_manifest
from launcher.contract.rundir import RunPaths
from launcher.scheduler import factory
from launcher.scheduler.base import Answer, Intent, JobRecord, JobRequest, Scheduler, SubmissionUnknown

SUBMIT = ["submit", "cfg.yaml", "--cluster=slurm-dev"]
FIRST = RunPaths(Path("runs/first"))


class Paper(Scheduler):
    """Jobs on a sheet of paper, which is passed to every instance."""

    name = "slurm"
    title = "Paper"
    noun = "line"
    requests: dict[str, JobRequest]
    states_of: dict[str, JobState]
    questions: int
    lose_answers: bool

    def submit(self, request: JobRequest) -> Job:
        number = str(len(self.requests) + 1)
        self.requests[number] = request
        self.states_of[number] = JobState.PENDING
        if self.lose_answers:
            raise SubmissionUnknown("the paper fell off the table")
        return self._job(number)

    def find(self, name: str, intent: Intent, started: JobId | None) -> Job | None:
        written = [number for number, request in self.requests.items() if request.intent == intent]
        return self._job(written[0]) if written else None

    def states(self, jobs: Sequence[Job], owners: Sequence[int], *, fresh: bool) -> Answer:
        type(self).questions += 1
        known = [job for job in jobs if job.id.text in self.states_of]
        return Answer(
            records={job.id: JobRecord(job_id=job.id.text, state=self.states_of[job.id.text]) for job in known}
        )

    def cancel(self, job: Job) -> None:
        self.states_of[job.id.text] = JobState.CANCELLED

    def array_elements(self, job: Job, size: int) -> list[Job]:
        return [dataclasses.replace(job, id=JobId(f"{job.id}/{number}", self.name)) for number in range(size)]

    def max_array_size(self) -> int:
        return 3

    def job_limits(self) -> dict[str, int]:
        return {"MaxLines": 4}

    def _job(self, number: str) -> Job:
        return Job(id=JobId(number, self.name, self.requests[number].intent.token), submitted_at=time.time())


@pytest.fixture
def paper(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> type[Paper]:
    """A clean sheet in the place of Slurm, whose commands are missing."""
    for name, value in (("requests", {}), ("states_of", {}), ("questions", 0), ("lose_answers", False)):
        monkeypatch.setattr(Paper, name, value, raising=False)
    monkeypatch.setitem(factory._SCHEDULERS, "slurm", Paper)
    monkeypatch.setenv("PATH", "/nonexistent")
    return Paper


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    capsys.readouterr()
    assert main(["status", "--json"]) == 0
    return {row["run"]: row["state"] for row in json.loads(capsys.readouterr().out)}


def test_a_run_from_submit_to_its_end(paper: type[Paper], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(SUBMIT) == 0
    assert "submitted  line 1, script " in capsys.readouterr().out
    assert (shown(capsys), paper.questions) == ({"first": "PENDING"}, 1)
    assert main(["resubmit", "first"]) == ExitCode.CONFLICT
    assert main(["cancel", "first"]) == 0
    assert shown(capsys) == {"first": "CANCELLED"}
    assert main(["resubmit", "first"]) == 0
    assert [job.id.text for job in read_manifest(FIRST).jobs] == ["1", "2"]
    paper.states_of["2"] = JobState.TIMEOUT
    assert shown(capsys) == {"first": "TIMEOUT"}


def test_a_lost_answer_makes_one_job(paper: type[Paper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "lose_answers", True)
    assert main(SUBMIT) == 0
    assert [job.id.text for job in read_manifest(FIRST).jobs] == list(paper.requests) == ["1"]


def test_a_refusal_leaves_nothing(
    paper: type[Paper], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(self: Paper, request: JobRequest) -> Job:
        raise SchedulerError("no pen")

    monkeypatch.setattr(paper, "submit", refuse)
    assert main(SUBMIT) == ExitCode.SCHEDULER
    assert capsys.readouterr().err == "error: no pen\n"
    assert not Path("runs").exists()


def test_jobs_that_wait_for_others(paper: type[Paper]) -> None:
    assert main(SUBMIT) == 0
    assert main([*SUBMIT, "name=second", "after=first"]) == 0
    (dependency,) = paper.requests["2"].waits_for
    assert (dependency.job.text, dependency.when) == ("1", "succeeded")
    with Path("cfg.yaml").open("a") as file:
        file.write("sweep: {product: {train.seed: [1, 2]}, max_at_once: 1}\n")
    assert main([*SUBMIT, "name=swept"]) == 0
    (dependency,) = paper.requests["4"].waits_for
    assert (dependency.job.text, dependency.when) == ("3", "ended")


def test_arrays_and_limits(paper: type[Paper], capsys: pytest.CaptureFixture[str]) -> None:
    config = Path("cfg.yaml").read_text()
    Path("cfg.yaml").write_text(f"{config}sweep: {{product: {{train.seed: [1, 2, 3, 4]}}, as: array}}\n")
    assert main([*SUBMIT, "--json"]) == 0
    jobs = json.loads(capsys.readouterr().out)["runs"]
    assert jobs == {"first-0": "1/0", "first-1": "1/1", "first-2": "1/2", "first-3": "2/0"}
    assert [request.array and request.array.size for request in paper.requests.values()] == [3, 1]
    Path("cfg.yaml").write_text(f"{config}sweep: {{product: {{train.seed: [1, 2, 3, 4, 5]}}}}\n")
    assert main([*SUBMIT, "name=more"]) == ExitCode.SCHEDULER
    assert "the sweep has 5 runs, and Paper's MaxLines is 4" in capsys.readouterr().err
