"""Parsers, on outputs of real Slurms (tests/fixtures/slurm/SOURCES.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from launcher.contract.job_state import JobState
from launcher.scheduler.base import JobRecord
from launcher.scheduler.slurm.parsers import newest, parse_sacct, parse_squeue, split_job_id
from launcher.scheduler.slurm.states import SLURM_STATES

FIXTURES = Path(__file__).parents[3] / "fixtures" / "slurm"


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


def test_array_ids_with_a_step() -> None:
    """Seen on Slurm 22.05, which shortens `--array=1,3,5` to this."""
    assert split_job_id("7_[1-5:2%5]") == ["7_1", "7_3", "7_5"]
    assert split_job_id("7_[0-8:4,9]") == ["7_0", "7_4", "7_8", "7_9"]
    assert [record.job_id for record in parse_squeue("7_[1-3:2%5]|PENDING|None|N/A|a")] == ["7_1", "7_3"]


def test_name_that_accounting_does_not_know_yet() -> None:
    """Seen on Slurm 22.05 with slurmdbd, in the first seconds after a job began."""
    (record,) = parse_sacct("JobID|State|JobName\n7|RUNNING|allocation\n")
    assert record.name == ""


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


def test_squeue_table_of_a_site() -> None:
    """The table is never parsed: it is refused line by line. The state it cuts is known all the same."""
    table = fixture("squeue-table-cut")
    assert list(parse_squeue(table)) == []
    job, _, name, _, state = table.splitlines()[1].split()[:5]
    (record,) = parse_squeue(f"{job}|{state}|None|N/A|{name}")
    assert record.state is JobState.PENDING


def test_squeue_names_may_hold_the_separator_and_odd_lines_are_passed_over() -> None:
    records = list(parse_squeue("7|RUNNING|None [(null)]|N/A|a|b|my comment\nCLUSTER: far\n|||||\n"))
    assert [(record.job_id, record.name, record.reason) for record in records] == [("7", "a|b", "")]


TOKEN = f"sft-{'0a' * 16}"


def test_tokens_and_what_a_job_waits_for() -> None:
    (record,) = parse_squeue(f"7|PENDING|Dependency [afterok:5(unfulfilled)]|N/A|a|b|mine {TOKEN}\n")
    assert (record.name, record.token) == ("a|b", TOKEN)
    assert (record.reason, record.waits_for) == ("Dependency", "afterok:5(unfulfilled)")
    head = "JobID|State|ExitCode|Start|JobName|SubmitLine"
    line = f"7|FAILED|1:0|2026-01-01T00:00:00|a|sbatch --comment=x|y {TOKEN} /r/job.sh"
    (account,) = parse_sacct(f"{head}\n{line}\nand a second line of the command\n")
    assert (account.name, account.token, account.exit_code) == ("a", TOKEN, 1)


_JOB = st.sampled_from(
    ["7", "7_1", "7_[1-3%2]", "7_[0-2,5]", "7+1", "7.batch", "7_[3-1]", "7_[,]", "7_[-]", "7_[1-]", "x", ""]
)
_WORD = st.one_of(st.sampled_from([*SLURM_STATES, "CANCELLED by 0", "OUT_OF_ME+"]), st.text(max_size=12))
_ROW = st.lists(st.one_of(_JOB, _WORD), max_size=6).map("|".join)
_ANSWER = st.one_of(st.text(max_size=80), st.tuples(_JOB, st.lists(_ROW, max_size=4)).map(lambda it: "\n".join(it[1])))


@given(_ANSWER)
@example("7_[0-99999999999]|RUNNING|||")
@example("\N{ARABIC-INDIC DIGIT SEVEN}|RUNNING|None|N/A|a")
def test_no_answer_breaks_the_parsers(text: str) -> None:
    for record in [
        *parse_squeue(text),
        *parse_sacct(text),
        *parse_sacct(f"JobID|State|ExitCode|Start|JobName\n{text}"),
    ]:
        assert record.state in JobState
        assert record.job_id
    newest(parse_squeue(text))
