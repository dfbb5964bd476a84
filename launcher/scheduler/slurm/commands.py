"""Slurm's commands with timeouts; sbatch itself is called in `executor`.

Fields are asked for by name, with a separator and without a header, and text of users comes last, so that neither a
site's default format nor a job's name can move a column. A command that fails raises SchedulerError: it means
"unknown", never "gone".
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import subprocess
import time
from collections.abc import Sequence

from launcher.contract.errors import SchedulerError
from launcher.scheduler.base import JobRecord
from launcher.scheduler.slurm.environment import clean_environment
from launcher.scheduler.slurm.parsers import newest, parse_sacct, parse_squeue
from launcher.scheduler.slurm.partitions import Partition, parse_partitions

TIMEOUT_SECONDS = 30
_CLOCK_SKEW_SECONDS = 3600
_NO_ACCOUNTING = ("accounting storage is disabled", "is not on PATH")


def queue(users: Sequence[int]) -> dict[str, JobRecord]:
    """Return squeue's records of all jobs of the users with these ids. Jobs that it has dropped are absent."""
    owners = ",".join(map(str, users))
    text = _run(["squeue", "--noheader", "--states=all", f"--user={owners}", "--format=%i|%T|%r|%S|%j"])
    return newest(parse_squeue(text))


def accounting(job_ids: Sequence[str], since: float) -> dict[str, JobRecord]:
    """Return sacct's records of these jobs, all submitted at `since` or later, or none at a site without accounting.

    `since` is in seconds since the epoch.
    """
    # Without a start time sacct would also find older jobs with the same ids: Slurm's ids wrap around.
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
    """Return the id of our job of this name whose comment or sbatch command line holds `token`, or None.

    `since` is when it was submitted at the earliest, in seconds since the epoch. squeue must answer; sacct adds jobs
    that squeue has dropped, at sites with accounting.
    """
    mine = [f"--user={os.getuid()}", f"--name={name}", "--noheader"]
    in_queue = _run(["squeue", *mine, "--states=all", "--format=%F|%k"])
    start = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - _CLOCK_SKEW_SECONDS))
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
    """Return how many elements a job array may have, or Slurm's default where it does not say."""
    shown = re.search(r"^MaxArraySize\s*=\s*([0-9]+)", _run(["scontrol", "show", "config"]), re.MULTILINE)
    return int(shown.group(1)) if shown is not None else 1001


def job_limits() -> dict[str, int]:
    """Return the limits that are set on how many jobs we may have queued, by Slurm's names."""
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
    """Cancel jobs. A job that has ended already is no error to Slurm."""
    _run(["scancel", *job_ids])


def expected_start(script: str) -> str:
    """Return what `sbatch --test-only` says of a script: when and where it would start. Submits nothing."""
    return _answer(["sbatch", "--test-only"], script).stderr.strip().removeprefix("sbatch: ")


def partitions() -> list[Partition]:
    """Return the partitions that are up, in Slurm's order."""
    return parse_partitions(_run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G"]))


def first_node() -> str:
    """Return the name of one node of the cluster."""
    return (_run(["sinfo", "--noheader", "--Node", "--format=%N"]).split() or [""])[0]


def srun_help() -> str:
    """Return srun's list of options, which includes those of plugins."""
    return _run(["srun", "--help"])


def _run(command: Sequence[str]) -> str:
    return _answer(command).stdout


def _answer(command: Sequence[str], stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    what = command[0]
    try:
        done = subprocess.run(
            command,
            input=stdin,
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
