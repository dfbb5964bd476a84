"""The only module that asks Slurm something after a job is submitted: commands with timeouts, and their parsers.

Fields are asked for by name with a separator and without a header, user text last, so that neither a site's default
format nor a job's name can move a column. A command that fails means "unknown", never "gone": SchedulerError.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from launcher.contract.errors import SchedulerError
from launcher.contract.job_state import JobState, from_slurm
from launcher.scheduler.environment import clean_environment

TIMEOUT_SECONDS = 30
_CLOCK_SKEW_SECONDS = 3600
_NO_NAME_YET = "allocation"  # what slurmdbd shows for a job whose name the controller has not sent yet
_NO_ACCOUNTING = ("accounting storage is disabled", "is not on PATH")

_HELD_REASONS = ("JobHeldUser", "JobHeldAdmin", "launch failed requeued held", "launch_failed_requeued_held")
_JOB_ID = re.compile(r"[0-9]+(_[0-9]+|_\[[0-9,:%-]+\])?(\+[0-9]+)?")  # steps have a dot; components of a job a plus
_GPU = re.compile(r"\bgpu:(?:([A-Za-z][\w.-]*):)?(\d+)")  # gpu:8, gpu:h100:8(S:0-1)
_ARRAY = re.compile(r"([0-9]+)_\[([0-9,:-]+)(?:%[0-9]+)?\]")
_TASKS = re.compile(r"([0-9]{1,7})(?:-([0-9]{1,7})(?::([1-9][0-9]{0,6}))?)?")
_MOST_TASKS = 4_000_001  # Slurm's own bound on MaxArraySize


@dataclass(frozen=True, kw_only=True, slots=True)
class JobRecord:
    """What Slurm says of one job."""

    job_id: str
    state: JobState
    reason: str = ""
    exit_code: int | None = None
    signal: int | None = None
    start: str = ""
    name: str = ""

    @property
    def expected_start(self) -> str | None:
        """When a waiting job is to start, local time; None where Slurm has no plan for it yet."""
        return self.start.replace("T", " ") if self.start[:1].isdigit() else None


def queue(users: Sequence[int]) -> dict[str, JobRecord]:
    """squeue's answer for all jobs of the users with these ids; jobs it has forgotten are absent."""
    owners = ",".join(map(str, users))
    text = _run(["squeue", "--noheader", "--states=all", f"--user={owners}", "--format=%i|%T|%r|%S|%j"])
    return newest(parse_squeue(text))


def accounting(job_ids: Sequence[str], since: float) -> dict[str, JobRecord]:
    """sacct's answer for these jobs, all submitted at `since` or later; empty where the site keeps no accounts.

    Without a start time sacct would find what had the same id before ids began again from 1.
    """
    began = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - _CLOCK_SKEW_SECONDS))
    command = ["sacct", "--allocations", "--duplicates", "--parsable2", f"--starttime={began}"]
    command += [f"--jobs={','.join(job_ids)}", "--format=JobID,State,ExitCode,Start,JobName"]
    try:
        return newest(parse_sacct(_run(command)))
    except SchedulerError as error:
        if any(words in str(error) for words in _NO_ACCOUNTING):
            return {}
        raise


def find_job(name: str, token: str, since: float) -> str | None:
    """The id of our job of this name whose comment, or whose sbatch command line, holds `token`.

    `since` is when it was submitted at the earliest (seconds since the epoch). The queue must answer; the accounts add
    jobs that it has forgotten, where a site keeps any.
    """
    mine = [f"--user={os.getuid()}", f"--name={name}", "--noheader"]
    in_queue = _run(["squeue", *mine, "--states=all", "--format=%F|%k"])
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - 3600))
    command = ["sacct", *mine, "--allocations", "--parsable2", f"--starttime={start}"]
    accounts = ""
    if token not in in_queue:
        with contextlib.suppress(SchedulerError):
            accounts = _run([*command, "--format=JobID,Comment,SubmitLine"])
    for line in (*in_queue.splitlines(), *accounts.splitlines()):
        job_id, _, text = line.partition("|")
        if token in text:
            return re.split(r"[_+.]", job_id.strip())[0]
    return None


def max_array_size() -> int:
    """How many elements a job array may have; Slurm's default where it does not say."""
    shown = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", _run(["scontrol", "show", "config"]), re.MULTILINE)
    return int(shown.group(1)) if shown is not None else 1001


def job_limits() -> dict[str, int]:
    """Slurm's limits on how many jobs we may have queued, by name; without those nobody has set."""
    limits = {}
    shown = re.search(r"^MaxJobCount\s*=\s*([0-9]+)", _run(["scontrol", "show", "config"]), re.MULTILINE)
    if shown is not None:
        limits["MaxJobCount"] = int(shown.group(1))
    with contextlib.suppress(SchedulerError):  # no accounting
        user = pwd.getpwuid(os.getuid()).pw_name
        asked = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}"]
        given = [int(word) for word in _run([*asked, "format=MaxSubmitJobs"]).split() if word.isdecimal()]
        if given:
            limits["MaxSubmitJobs"] = max(given)
    return limits


def cancel(job_ids: Sequence[str]) -> None:
    """scancel; a job that has ended already is no error to Slurm."""
    _run(["scancel", *job_ids])


def expected_start(script: str) -> str:
    """What `sbatch --test-only` says of a script: when and where it would start. Nothing is submitted or written."""
    return _answer(["sbatch", "--test-only"], script).stderr.strip().removeprefix("sbatch: ")


@dataclass(frozen=True, kw_only=True, slots=True)
class Partition:
    """A partition as sinfo has it; sizes are those that every node of it has."""

    name: str
    is_default: bool
    time_limit: str | None
    """In Slurm's notation; None for no limit."""
    nodes: int
    cpus: int
    memory_mib: int
    gpus: int
    gpu_type: str | None


def partitions() -> list[Partition]:
    """The partitions that are up, in Slurm's order."""
    return parse_partitions(_run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G"]))


def parse_partitions(text: str) -> list[Partition]:
    """Lines `name*|up|limit|nodes|cpus|memory|gres`; a partition has a line for each kind of node."""
    found: dict[str, Partition] = {}
    for line in text.splitlines():
        fields = line.strip().split("|", 6)
        if len(fields) != 7 or fields[1] != "up":
            continue
        name, _, limit, nodes, cpus, memory, gres = fields
        gpu = _GPU.search(gres)
        one = Partition(
            name=name.rstrip("*"),
            is_default=name.endswith("*"),
            time_limit=None if limit in ("infinite", "n/a") else limit,
            nodes=_leading_number(nodes),
            cpus=_leading_number(cpus),
            memory_mib=_leading_number(memory),
            gpus=int(gpu.group(2)) if gpu else 0,
            gpu_type=gpu.group(1) if gpu else None,
        )
        other = found.get(one.name)
        found[one.name] = one if other is None else _common(other, one)
    return list(found.values())


def _common(one: Partition, other: Partition) -> Partition:
    """What nodes of both kinds have."""
    return replace(
        one,
        nodes=one.nodes + other.nodes,
        cpus=min(one.cpus, other.cpus),
        memory_mib=min(one.memory_mib, other.memory_mib),
        gpus=min(one.gpus, other.gpus),
        gpu_type=one.gpu_type if one.gpu_type == other.gpu_type else None,
    )


def _leading_number(text: str) -> int:
    """`64` and `64+`, as sinfo writes a lower bound."""
    digits = re.match(r"\d+", text)
    return int(digits.group()) if digits else 0


def first_node() -> str:
    """Name of one node of the cluster."""
    return (_run(["sinfo", "--noheader", "--Node", "--format=%N"]).split() or [""])[0]


def srun_help() -> str:
    """srun's own list of options, with those that plugins add."""
    return _run(["srun", "--help"])


def _run(command: Sequence[str]) -> str:
    return _answer(command).stdout


def _answer(command: Sequence[str], given: str | None = None) -> subprocess.CompletedProcess[str]:
    what = command[0]
    try:
        done = subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_SECONDS,
            check=False,
            env={**clean_environment(), "SLURM_BITSTR_LEN": "0"},  # ids of arrays in full
        )
    except FileNotFoundError:
        raise SchedulerError(f"{what} is not on PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{what} gave no answer within {TIMEOUT_SECONDS} s; Slurm may be overloaded") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SchedulerError(f"{what} failed: {said}")
    return done


def parse_squeue(text: str) -> Iterator[JobRecord]:
    """Records of lines `id|state|reason|start|name`; lines of another shape are passed over."""
    for line in text.splitlines():
        fields = line.split("|", 4)
        if len(fields) != 5 or not _JOB_ID.fullmatch(fields[0]):
            continue
        job, state, reason, start, name = fields
        ours = from_slurm(state)
        for job_id in split_job_id(job):
            yield JobRecord(
                job_id=job_id,
                state=JobState.HELD if ours is JobState.PENDING and reason in _HELD_REASONS else ours,
                reason="" if reason in ("None", "(null)") else reason,
                start=start,
                name=name,
            )


def parse_sacct(text: str, separator: str = "|") -> Iterator[JobRecord]:
    """Allocations in a sacct answer that begins with a header; steps and broken lines are passed over."""
    lines = text.splitlines()
    header = lines[0].split(separator) if lines else []
    for line in lines[1:]:
        fields = line.split(separator)
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
            )


def newest(records: Iterable[JobRecord]) -> dict[str, JobRecord]:
    """The last attempt of each job id: a requeue keeps the id. Rows come in order; a later start wins over order."""
    found: dict[str, JobRecord] = {}
    for record in records:
        before = found.get(record.job_id)
        if before is None or _start(record) >= _start(before):
            found[record.job_id] = record
    return found


def _start(record: JobRecord) -> str:
    """ISO time, which sorts as text; a job that has not started sorts last, as it is the newest."""
    return record.start if record.start[:1].isdigit() else "~"


def split_job_id(text: str) -> list[str]:
    """`20_[2-4,7%5]` → 20_2, 20_3, 20_4, 20_7; `20_[1-5:2]` → 20_1, 20_3, 20_5; any other id is itself."""
    match = _ARRAY.fullmatch(text.strip())
    if match is None:
        return [text.strip()]
    tasks: list[str] = []
    for part in filter(None, map(_TASKS.fullmatch, match.group(2).split(","))):
        first, last = int(part[1]), min(int(part[2] or part[1]), _MOST_TASKS)
        tasks += [f"{match.group(1)}_{task}" for task in range(first, last + 1, int(part[3] or 1))]
    return tasks


def time_limit_minutes(text: str | None) -> float | None:
    """Minutes of a limit in Slurm's notation; None for no limit."""
    if text is None or not text[:1].isdigit():
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MM[:SS]
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return (int(days or 0) * 24 + hours) * 60 + minutes + seconds / 60
