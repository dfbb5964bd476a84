"""Identity of jobs, names of attempts, and the manifest that records jobs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from launcher.contract.errors import RunStateError
from launcher.contract.job import AttemptName, Job, JobId, job_fields
from launcher.contract.manifest import read_manifest, write_manifest
from launcher.contract.rundir import append_event
from launcher.runs.listing import listing
from launcher.runs.snapshot import snapshot
from tests.launcher.runs.test_state import make_run

SLURM_JOB = {"job_id": "123_4", "scheduler": "slurm", "submitted_at": 5.5, "token": "sft-1"}


@pytest.mark.parametrize(
    ("text", "job", "restart", "scheduler"),
    [
        ("7.0", "7", 0, "slurm"),
        ("7.2-11", "7", 2, "slurm"),
        ("123_4.12", "123_4", 12, "slurm"),
        ("local-3", None, None, "local"),
        ("by-hand", None, None, "local"),
        ("7", None, None, "local"),
        ("", None, None, "local"),
    ],
)
def test_names_of_attempts(text: str, job: str | None, restart: int | None, scheduler: str) -> None:
    name = AttemptName(text)
    assert (name.job, name.restart, name.scheduler) == (job, restart, scheduler)


def test_the_attempt_that_follows_in_place() -> None:
    assert [AttemptName(text).next_in_place for text in ("7.0", "123_4.2-9", "local-3")] == [
        "7.0-1",
        "123_4.2-10",
        None,
    ]


def test_a_job_is_its_id_scheduler_and_token_together() -> None:
    job = Job.from_json(SLURM_JOB)
    assert job.id == JobId("123_4", "slurm", "sft-1")
    assert job.id not in (JobId("123_4", "local", "sft-1"), JobId("123_4", "slurm", "sft-2"))
    assert f"{job.id}" == "123_4"
    assert Job.from_json(job.as_json()) == job


def test_manifests_of_earlier_versions_and_later_ones(tmp_path: Path) -> None:
    """The file's `attempts` are the run's jobs: what is written has the keys that every version reads."""
    paths = make_run(tmp_path, "a")
    values = json.loads(paths.manifest.read_text())
    keys = {"job_id", "scheduler", "submitted_at", "host", "process_start", "token"}
    assert [set(job) for job in values["attempts"]] == [keys]
    assert "jobs" not in values
    old = {"job_id": "9", "scheduler": "local", "submitted_at": 2, "host": "n", "process_start": 17}
    paths.manifest.write_text(json.dumps({**values, "attempts": [old], "key_of_a_later_version": 1}))
    manifest = read_manifest(paths)
    assert manifest.jobs == (Job(id=JobId("9", "local"), submitted_at=2, host="n", process_start=17),)
    write_manifest(paths, manifest.with_job(Job.from_json(SLURM_JOB)))
    assert [job.id.text for job in read_manifest(paths).jobs] == ["9", "123_4"]


@pytest.mark.parametrize(
    "change", [{"scheduler": "pbs"}, {"submitted_at": "soon"}, {"submitted_at": None}, {"process_start": "x"}]
)
def test_a_job_that_cannot_be_read_is_said_to_be_damaged(tmp_path: Path, change: dict[str, object]) -> None:
    paths = make_run(tmp_path, "a")
    values = json.loads(paths.manifest.read_text())
    values["attempts"][0] |= change
    paths.manifest.write_text(json.dumps(values))
    with pytest.raises(RunStateError, match=r"manifest\.json cannot be read: "):
        read_manifest(paths)
    assert listing([paths])[0].state == "UNKNOWN"


def test_an_event_says_which_scheduler_its_job_has(tmp_path: Path) -> None:
    """Events of earlier versions do not: there the attempt's name tells."""
    paths = make_run(tmp_path, "a")
    write_manifest(paths, dataclasses.replace(read_manifest(paths), jobs=()))
    for fields, scheduler in (
        ({"attempt": "8.0", "job_id": "8"}, "slurm"),
        ({"attempt": "local-1", "job_id": "9"}, "local"),
        ({"attempt": "by-hand", "job_id": "10"}, "local"),
        ({"attempt": "11.0", "job_id": "11", "scheduler": "local"}, "local"),
    ):
        append_event(paths, "attempt_started", **fields)
        job = snapshot(paths).job
        assert job is not None
        assert job.id == JobId(fields["job_id"], scheduler)  # type: ignore[arg-type]
    append_event(paths, "attempt_started", attempt="12.0", job_id="12", scheduler="pbs")
    with pytest.raises(RunStateError, match="'pbs' is no scheduler; known: slurm, local"):
        snapshot(paths)


def test_ids_of_two_clusters_may_be_the_same() -> None:
    far = Job.from_json({**SLURM_JOB, "cluster": "far"})
    assert Job.from_json(far.as_json()) == far
    assert f"{far.id}" == "123_4;far"
    assert far.id != Job.from_json(SLURM_JOB).id
    assert far.id.is_job("123_4", "far")
    assert far.id.is_job("123_4", "")  # as events of earlier versions name it
    assert not far.id.is_job("123_4", "near")
    assert not far.id.is_job("123_5", "far")
    assert Job.from_json(SLURM_JOB).id.is_job("123_4", "near")
    assert job_fields(far.id) == {"job_id": "123_4", "cluster": "far"}
