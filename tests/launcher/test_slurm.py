"""Parsers on outputs of real Slurms (tests/fixtures/slurm/SOURCES.md), and commands that fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher import slurm
from launcher.errors import SchedulerError
from launcher.slurm import JobRecord, newest, parse_sacct, parse_squeue, split_job_id, time_limit_minutes
from launcher.state import JobState
from tests.launcher.conftest import Commands

FIXTURES = Path(__file__).parents[1] / "fixtures" / "slurm"


def fixture(name: str) -> str:
    return (FIXTURES / f"{name}.txt").read_text(errors="replace")


def states(records: dict[str, JobRecord]) -> dict[str, JobState]:
    return {job_id: record.state for job_id, record in records.items()}


def squeue_lines(name: str, separator: str, columns: tuple[int, int, int, int, int]) -> str:
    """A fixture's rows in the order in which we ask for the columns."""
    rows = [line.split(separator) for line in fixture(name).splitlines()]
    return "\n".join("|".join(row[column] for column in columns) for row in rows)


def test_array_ids() -> None:
    assert [split_job_id(line) for line in fixture("array-ids").splitlines()] == [
        ["12"],
        ["12_0"],
        [f"20_{task}" for task in range(2, 8)],
        [f"20_{task}" for task in (*range(2, 8), *range(12, 18), 22)],
        ["20_0"],
        [f"12_{task}" for task in (2, *range(4, 13))],
    ]


def test_sacct_steps_and_array() -> None:
    assert states(newest(parse_sacct(fixture("sacct-steps-and-array")))) == {
        "5610980": JobState.RUNNING,
        "20956421_0": JobState.RUNNING,
        "20956421_2": JobState.PENDING,
        "20956421_3": JobState.PENDING,
        "20956421_4": JobState.PENDING,
    }


@pytest.mark.parametrize(
    ("name", "separator", "expected"),
    [
        ("sacct-cancelled-by", "|", dict.fromkeys(("39125549", "39125551", "39125552"), JobState.CANCELLED)),
        ("sacct-heterogeneous", "|", {f"1853+{part}": JobState.COMPLETED for part in range(3)}),
        ("sacct-failed", "|", {"1902": JobState.FAILED}),
        ("sacct-cancelled-trailing-blank", "|", {"89": JobState.CANCELLED}),
        ("sacct-broken-lines", "|#", {"201729": JobState.FAILED, "201844": JobState.REQUEUED}),
        ("sacct-half-a-row", "|", {}),
        (
            "sacct-extern-first",
            "|",
            {"3557891": JobState.FAILED, "3557892": JobState.TIMEOUT},
        ),
    ],
)
def test_sacct_allocations(name: str, separator: str, expected: dict[str, JobState]) -> None:
    assert states(newest(parse_sacct(fixture(name), separator))) == expected


def test_sacct_exit_code_and_signal() -> None:
    record = newest(parse_sacct(fixture("sacct-failed")))["1902"]
    assert (record.exit_code, record.signal) == (2, 0)
    out_of_memory = "JobID|State|ExitCode\n7|OUT_OF_MEMORY|0:125\n"
    record = newest(parse_sacct(out_of_memory))["7"]
    assert (record.state, record.exit_code, record.signal) == (JobState.OUT_OF_MEMORY, 0, 125)


def test_sacct_with_a_delimiter_at_the_end() -> None:
    for block in fixture("sacct-parsable").split("\n\n"):
        with_ids = "\n".join(
            f"{'JobID' if number == 0 else 5}|{line}" for number, line in enumerate(block.splitlines())
        )
        (record,) = parse_sacct(with_ids)
        assert record.state in (JobState.OUT_OF_MEMORY, JobState.NODE_FAIL)


def test_sacct_of_a_requeued_job_tells_its_last_attempt() -> None:
    header = "AdminComment|AllocCPUS|Elapsed|JobID|JobIDRaw|MaxRSS|NNodes|ReqMem|State|Timelimit|TotalCPU"
    rows = "\n".join(fixture("sacct-duplicates").splitlines()[1:])
    records = [record for record in parse_sacct(f"{header}\n{rows}") if record.job_id == "235929"]
    assert [record.state for record in records] == [JobState.REQUEUED] * 3
    late_row_first = "JobID|State|Start\n7|COMPLETED|2026-01-02T00:00:00\n7|PREEMPTED|2026-01-01T00:00:00\n"
    assert states(newest(parse_sacct(late_row_first))) == {"7": JobState.COMPLETED}
    not_started = "JobID|State|Start\n7|PENDING|Unknown\n7|PREEMPTED|2026-01-01T00:00:00\n"
    assert states(newest(parse_sacct(not_started))) == {"7": JobState.PENDING}


def test_sacct_array_task() -> None:
    header = "AdminComment|AllocCPUS|Elapsed|JobID|JobIDRaw|MaxRSS|NNodes|ReqMem|State|Timelimit|TotalCPU"
    (record,) = parse_sacct(f"{header}\n{fixture('sacct-array-raw-ids')}")
    assert (record.job_id, record.state) == ("39889258_1426", JobState.COMPLETED)


def test_squeue_of_a_gpu_site() -> None:
    records = newest(parse_squeue(squeue_lines("squeue-gcm", "|#", (2, 9, 27, 20, 4))))
    assert states(records) == {
        "45704744": JobState.RUNNING,
        "42953390_320": JobState.RUNNING,
        "42956774_3": JobState.RUNNING,
        "22783212": JobState.PENDING,
        "42271120_7": JobState.PENDING,
        "42271120_8": JobState.PENDING,
    }
    assert records["22783212"].reason == "DependencyNeverSatisfied"
    assert records["42271120_7"].reason == "JobArrayTaskLimit"
    assert records["45704744"].reason == ""


def test_squeue_with_compact_codes() -> None:
    records = newest(parse_squeue(squeue_lines("squeue-aiida", "^^^", (0, 1, 2, 11, 12))))
    assert [record.state for record in records.values()].count(JobState.RUNNING) == 4
    assert records["863313"].state is JobState.HELD
    assert records["862540"].reason == "Dependency"


def test_squeue_of_a_job_held_after_a_failed_launch() -> None:
    line = fixture("squeue-launch-failed-held").splitlines()[0]
    reason = line.partition("(")[2].rstrip(")")
    (record,) = parse_squeue(f"80520_36|{line.split()[3]}|{reason}|N/A|x")
    assert record.state is JobState.HELD
    (record,) = parse_squeue("80520|CANCELLED|JobHeldUser|N/A|x")
    assert record.state is JobState.CANCELLED


def test_squeue_names_may_hold_the_separator_and_odd_lines_are_passed_over() -> None:
    records = list(parse_squeue("7|RUNNING|None|N/A|a|b\nslurm says hello\n|||||\n"))
    assert [(record.job_id, record.name) for record in records] == [("7", "a|b")]


def test_queue_asks_once_and_takes_a_forgotten_job_for_absent(commands: Commands) -> None:
    commands.add("squeue", "echo '7|RUNNING|None|2026-01-01T00:00:00|a'")
    assert list(slurm.queue(["7", "8"])) == ["7"]
    assert commands.calls("squeue") == ["--noheader --states=all --jobs=7,8 --format=%i|%T|%r|%S|%j"]
    commands.add("squeue", f"echo '{fixture('squeue-unknown-job').split('stderr: ')[1].strip()}' >&2; exit 1")
    assert slurm.queue(["7"]) == {}
    assert slurm.queue([]) == {}


def test_queue_that_fails_is_no_answer(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.add("squeue", "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(SchedulerError, match=r"^squeue failed: slurm_load_jobs error: Unable to contact"):
        slurm.queue(["7"])
    commands.add("squeue", "exec sleep 10")
    monkeypatch.setattr(slurm, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(SchedulerError, match=r"^squeue gave no answer within 0\.2 s"):
        slurm.queue(["7"])
    monkeypatch.setenv("PATH", str(commands.folder / "nothing"))
    with pytest.raises(SchedulerError, match=r"^squeue is not on PATH"):
        slurm.queue(["7"])


def test_site_without_accounting(commands: Commands) -> None:
    commands.add("sacct", f"echo '{fixture('sacct-no-accounting').split('stderr: ')[1].strip()}' >&2; exit 1")
    assert slurm.accounting(["7"]) == {}
    assert slurm.accounting([]) == {}
    assert len(commands.calls("sacct")) == 1


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        (None, None),
        ("UNLIMITED", None),
        ("30", 30),
        ("1:30", 1.5),
        ("01:00:00", 60),
        ("1-00", 1440),
        ("1-2:30", 1590),
        ("1-02:03:30", 1563.5),
    ],
)
def test_time_limits(text: str | None, minutes: float | None) -> None:
    assert time_limit_minutes(text) == minutes
