"""Every scheduler that a cluster file may name has an implementation, a template and the protocol's methods."""

from __future__ import annotations

import socket
import typing
from pathlib import Path

import pytest

from launcher.contract import resources
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.schedulers import CAPABILITIES, SchedulerName, scheduler_name
from launcher.contract.spec import ClusterSpec, ResourcesSpec
from launcher.scheduler.base import Array, Dependency, Intent, JobRequest
from launcher.scheduler.factory import scheduler_of
from launcher.scheduler.slurm.scheduler import Slurm, submit_options
from launcher.submission.render_script import template_name

NAMES: tuple[SchedulerName, ...] = typing.get_args(SchedulerName)
INTENT = Intent(token="sft-1", scheduler="slurm", written_at=1.0, host="login")


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_implementation_and_a_template(name: SchedulerName) -> None:
    scheduler = scheduler_of(name)
    assert (scheduler.name, scheduler_name(name)) == (name, name)
    assert scheduler.capabilities is CAPABILITIES[name]
    assert scheduler.title
    assert resources.find("templates", template_name(ClusterSpec(scheduler=name))).is_file()
    if not scheduler.capabilities.arrays:
        with pytest.raises(NotImplementedError, match="has no job arrays"):
            scheduler.array_elements(Job(id=JobId("7", name), submitted_at=0.0), 2)


def test_options_of_a_submission(tmp_path: Path) -> None:
    """What the user has given for an option that we set too is repeated: the command line replaces the script's own."""
    given = ResourcesSpec(extra_sbatch=["--comment=old", "--comment=my own", "--dependency=singleton", "--nice=5"])
    waits_for = (
        Dependency(job=JobId("7", "slurm"), when="succeeded"),
        Dependency(job=JobId("8_1", "slurm"), when="ended"),
    )
    plain = JobRequest(name="a", script=tmp_path, folder=tmp_path, intent=INTENT, resources=ResourcesSpec())
    assert submit_options(plain) == ["--comment=sft-1"]
    full = JobRequest(
        name="a",
        script=tmp_path,
        folder=tmp_path,
        intent=INTENT,
        resources=given,
        waits_for=waits_for,
        exclude="n[1-2],n7",
        array=Array(size=4, at_once=2),
    )
    assert submit_options(full) == [
        "--comment=my own sft-1",
        "--exclude=n[1-2],n7",
        "--dependency=singleton,afterok:7,afterany:8_1",
        "--array=0-3%2",
    ]


def test_elements_of_an_array_are_jobs_of_their_own() -> None:
    array = Job(id=JobId("7", "slurm", "sft-1"), submitted_at=1.0)
    assert [job.id for job in Slurm().array_elements(array, 2)] == [
        JobId("7_0", "slurm", "sft-1"),
        JobId("7_1", "slurm", "sft-1"),
    ]


def test_states_of_local_processes() -> None:
    here = socket.gethostname()
    jobs = [
        Job(id=JobId("1", "local"), submitted_at=0.0),
        Job(id=JobId("2", "local"), submitted_at=0.0, host="elsewhere", process_start=1),
        Job(id=JobId("4194305", "local"), submitted_at=0.0, host=here, process_start=1),
    ]
    records = scheduler_of("local").states(jobs, [0], fresh=True).records
    assert [records[job.id].state for job in jobs] == [JobState.UNKNOWN, JobState.UNKNOWN, JobState.FAILED]
    assert records[jobs[1].id].reason == "it runs on elsewhere; look there"
