"""Parsers of squeue's, sacct's and scontrol's answers.

Each is total: lines of another form are skipped, and no text makes a parser raise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from launcher.contract.job_state import JobState
from launcher.scheduler.base import JobRecord, JobView
from launcher.scheduler.slurm.states import from_slurm

_NO_NAME_YET = "allocation"  # what slurmdbd shows for a job whose name the controller has not sent yet
_HELD_REASONS = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "launch_failed_requeued_held")
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+|_\[[0-9,:%-]+\])?(\+[0-9]+)?")  # steps have a dot; components of a job a plus
_ARRAY = re.compile(r"([0-9]+)_\[([0-9,:-]+)(?:%[0-9]+)?\]")
_TASKS = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7})(?::([1-9][0-9]{0,6}))?)?")
_MOST_TASKS = 4_000_001  # Slurm's own bound on MaxArraySize
_LOG_WORDS = (
    (re.compile(r"DUE TO PREEMPTION"), JobState.PREEMPTED, "Slurm ended it for a job of higher priority"),
    (re.compile(r"DUE TO TIME LIMIT"), JobState.TIMEOUT, "Slurm ended it at its time limit"),
    (re.compile(r"DUE TO NODE FAILURE|srun: error: Node failure on"), JobState.NODE_FAIL, "Slurm lost a node of it"),
    (re.compile(r"DUE TO JOB REQUEUE"), JobState.PREEMPTED, "it was requeued from outside"),
)
"""What slurmstepd and srun write when Slurm ends a job."""
_TOKEN = re.compile(r"\bsft-[0-9a-f]{32}\b")
"""What launcher.submission.intent marks a submission with."""
_FIELD = re.compile(r"(?:^|\s)([A-Z][A-Za-z/:]*)=(\S*)")


def parse_squeue(text: str) -> Iterator[JobRecord]:
    """Yield the records in lines `id|state|reason [what it waits for]|start|name|comment`."""
    for line in text.splitlines():
        fields = line.split("|", 4)
        if len(fields) != 5 or not _JOB_ID.fullmatch(fields[0]):
            continue
        job, state, reason, start, texts = fields
        name, bar, comment = texts.rpartition("|")
        reason, _, waits_for = reason.removesuffix("]").partition(" [")
        known = from_slurm(state)
        for job_id in split_job_id(job):
            yield JobRecord(
                job_id=job_id,
                state=JobState.HELD if known is JobState.PENDING and reason in _HELD_REASONS else known,
                reason="" if reason in ("None", "(null)") else reason,
                start=start,
                waits_for="" if waits_for == "(null)" else waits_for,
                name=name if bar else texts,
                token=token_in(comment),
            )


def parse_sacct(text: str, separator: str = "|") -> Iterator[JobRecord]:
    """Yield the allocations in an answer of sacct that begins with a header, without the steps."""
    lines = text.splitlines()
    header = lines[0].split(separator) if lines else []
    for line in lines[1:]:
        fields = line.split(separator, max(0, len(header) - 1))  # the last is text of users
        row = dict(zip(header, fields, strict=False))
        job = row.get("JobID", "").strip()
        if len(fields) != len(header) or not _JOB_ID.fullmatch(job):
            continue
        code, _, signal = row.get("ExitCode", "").partition(":")
        for job_id in split_job_id(job):
            yield JobRecord(
                job_id=job_id,
                state=from_slurm(row.get("State", "")),
                exit_code=int(code) if code.isdigit() else None,
                signal=int(signal) if signal.isdigit() else None,
                start=row.get("Start", ""),
                name=row.get("JobName", "").removeprefix(_NO_NAME_YET),
                token=token_in(row.get("SubmitLine", "")),
            )


def token_in(text: str) -> str:
    """Return the token of a submission in a comment or a command line, or an empty text."""
    found = list(_TOKEN.finditer(text))
    return found[-1].group() if found else ""


def newest(records: Iterable[JobRecord]) -> dict[str, JobRecord]:
    """Return the record of the last start of each job, by job id: a requeued job keeps its id.

    The record with the latest start wins; of several with the same start the last one.
    """
    latest: dict[str, JobRecord] = {}
    for record in records:
        before = latest.get(record.job_id)
        if before is None or _start(record) >= _start(before):
            latest[record.job_id] = record
    return latest


def _start(record: JobRecord) -> str:
    """Return the start in ISO format, which sorts as text. A job that has not started sorts last, as the newest."""
    return record.start if record.start[:1].isdigit() else "~"


def split_job_id(text: str) -> list[str]:
    """Expand an array id: `20_[2-4,7%5]` → 20_2, 20_3, 20_4, 20_7, and `20_[1-5:2]` → 20_1, 20_3, 20_5."""
    match = _ARRAY.fullmatch(text.strip())
    if match is None:
        return [text.strip()]
    tasks: list[str] = []
    for part in filter(None, map(_TASKS.fullmatch, match.group(2).split(","))):
        first, last = int(part[1]), min(int(part[2] or part[1]), _MOST_TASKS)
        tasks += [f"{match.group(1)}_{task}" for task in range(first, last + 1, int(part[3] or 1))]
    return tasks


def parse_job_view(text: str) -> JobView | None:
    """Return what `scontrol show job -o` answered, or None where it did not answer."""
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(text):
        fields.setdefault(name, value)  # the first is Slurm's; a command line behind it may look like fields too
    if "JobState" not in fields:
        return None
    restarts = fields.get("Restarts", "")
    return JobView(
        state=from_slurm(fields["JobState"]),
        restarts=int(restarts) if restarts.isdigit() else 0,
        preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A", ""),
        excluded="" if fields.get("ExcNodeList") in (None, "(null)") else fields["ExcNodeList"],
    )


def parse_log(text: str) -> tuple[JobState, str] | None:
    """Return how Slurm ended a job according to the end of its logs, and words for people, or None."""
    return next(((state, words) for pattern, state, words in _LOG_WORDS if pattern.search(text)), None)
