"""Slurm's commands with timeouts; sbatch itself is called in `executor`.

Fields are asked for by name, with a separator and without a header, and text of users comes last, so that neither a
site's default format nor a job's name can move a column. A command that fails raises SchedulerError: it means
"unknown", never "gone". `clusters` is what Slurm's option of this name takes; empty for the cluster that is at hand.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pwd
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence

from launcher.contract.errors import SchedulerError
from launcher.scheduler.base import JobRecord
from launcher.scheduler.slurm.accounts import Use, parse_uses
from launcher.scheduler.slurm.environment import clean_environment
from launcher.scheduler.slurm.parsers import newest, parse_sacct, parse_squeue
from launcher.scheduler.slurm.partitions import Partition, parse_partitions

TIMEOUT_SECONDS = 30.0
GLANCE_SECONDS = 10.0
"""For a question whose answer a person waits for, and nobody acts on."""

_CLOCK_SKEW_SECONDS = 3600
_NO_ACCOUNTING = ("accounting storage is disabled", "is not on PATH")
_LIMITS_ENFORCED = ("limits", "safe", "all")  # words of AccountingStorageEnforce


def queue(users: Sequence[int], clusters: str = "", patience: float | None = None) -> dict[str, JobRecord]:
    """Return squeue's records of all jobs of the users with these ids. Jobs that it has dropped are absent."""
    owners = ",".join(map(str, users))
    command = ["squeue", *_at(clusters), "--noheader", "--states=all", f"--user={owners}"]
    return newest(parse_squeue(_run([*command, "--format=%i|%T|%r [%E]|%S|%j|%k"], patience)))


def accounting(
    job_ids: Sequence[str], since: float, clusters: str = "", patience: float | None = None
) -> dict[str, JobRecord]:
    """Return sacct's records of these jobs, all submitted at `since` or later, or none at a site without accounting.

    `since` is in seconds since the epoch.
    """
    # Without a start time sacct would also find older jobs with the same ids: Slurm's ids wrap around.
    command = ["sacct", *_at(clusters), "--allocations", "--duplicates", "--parsable2", _began(since)]
    command += [f"--jobs={','.join(job_ids)}"]
    try:
        return newest(parse_sacct(_with_submit_line(command, "JobID,State,ExitCode,Start,JobName", patience)))
    except SchedulerError as error:
        if any(words in str(error) for words in _NO_ACCOUNTING):
            return {}
        raise


def allocations(job_ids: Sequence[str], since: float, clusters: str = "") -> list[Use]:
    """Return sacct's records of every start of these jobs, or none at a site without accounting.

    `since` is when the first was submitted, in seconds since the epoch.
    """
    command = ["sacct", *_at(clusters), "--allocations", "--duplicates", "--parsable2", _began(since)]
    command += [f"--jobs={','.join(job_ids)}"]
    try:
        return list(parse_uses(_with_submit_line(command, "JobID,State,ElapsedRaw,Start,End,NNodes,AllocTRES")))
    except SchedulerError as error:
        if any(words in str(error) for words in _NO_ACCOUNTING):
            return []
        raise


def _with_submit_line(command: Sequence[str], fields: str, patience: float | None = None) -> str:
    """Return sacct's answer with the command line that submitted each job, if this Slurm (21.08 and later) keeps it."""
    try:
        return _run([*command, f"--format={fields},SubmitLine"], patience)
    except SchedulerError as error:
        if "SubmitLine" not in str(error):
            raise
        return _run([*command, f"--format={fields}"], patience)


def find_job(token: str, since: float, clusters: str = "") -> tuple[str, str] | None:
    """Return id and cluster of our job whose comment or sbatch command line holds `token`, or None.

    `since` is when it was submitted at the earliest, in seconds since the epoch. squeue must answer; sacct adds jobs
    that squeue has dropped, at sites with accounting.
    """
    mine = [*_at(clusters), f"--user={os.getuid()}"]
    # with a header squeue says which of several clusters a job is of
    header = [] if _is_several(clusters) else ["--noheader"]
    in_queue = _run(["squeue", *mine, *header, "--states=all", "--format=%F|%k"])
    found = next(_lines_with(token, in_queue, "" if _is_several(clusters) else clusters), None)
    if found is None:
        command = ["sacct", *mine, "--noheader", "--allocations", "--parsable2", _began(since)]
        with contextlib.suppress(SchedulerError):
            accounts = _run([*command, "--format=JobID,Cluster,Comment,SubmitLine"])
            found = next(_accounts_with(token, accounts, clusters), None)
    return found


def _lines_with(token: str, text: str, cluster: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        if line.startswith("CLUSTER: "):
            cluster = line.removeprefix("CLUSTER: ").strip()
        elif token in line:
            yield _without_element(line), cluster


def _accounts_with(token: str, text: str, clusters: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        _, _, rest = line.partition("|")
        if token in rest:
            yield _without_element(line), rest.partition("|")[0] if clusters else ""


def _without_element(line: str) -> str:
    return re.split(r"[_+.|]", line.strip())[0]


def local_cluster() -> str:
    """Return the name of the cluster that is at hand."""
    return _local_cluster(os.environ.get("SLURM_CONF", ""), shutil.which("scontrol") or "")


@functools.lru_cache
def _local_cluster(_conf: str, _program: str) -> str:
    return _config().get("ClusterName", "")


def max_array_size() -> int:
    """Return how many elements a job array may have, or Slurm's default where it does not say."""
    return int(_config().get("MaxArraySize", 1001))


def job_limits() -> dict[str, int]:
    """Return the limits that are set on how many jobs we may have queued, by Slurm's names."""
    config = _config()
    count = config.get("MaxJobCount", "")
    limits = {"MaxJobCount": int(count)} if count.isdecimal() else {}
    enforced = re.split(r"\W+", config.get("AccountingStorageEnforce", "").lower())
    if not set(enforced) & set(_LIMITS_ENFORCED):
        return limits  # sacctmgr shows limits that nobody enforces, as 0 where none was ever set
    with contextlib.suppress(SchedulerError):  # no accounting
        user = pwd.getpwuid(os.getuid()).pw_name
        asked = ["sacctmgr", "--noheader", "--parsable2", "show", "associations", f"user={user}"]
        given = [int(word) for word in _run([*asked, "format=MaxSubmitJobs"]).split() if word.isdecimal()]
        if given:
            limits["MaxSubmitJobs"] = max(given)
    return limits


def _config() -> dict[str, str]:
    """Return Slurm's configuration as the controller shows it, each value up to its first space."""
    return dict(re.findall(r"^(\w+)\s*=\s*(\S+)", _run(["scontrol", "show", "config"]), re.MULTILINE))


def own_accounts() -> list[str]:
    """Return the accounts that this user may submit under, as accounting has them."""
    asked = [
        "sacctmgr",
        "--noheader",
        "--parsable2",
        "show",
        "associations",
        f"user={pwd.getpwuid(os.getuid()).pw_name}",
    ]
    return [line for line in _run([*asked, "format=Account"]).splitlines() if line]


def cancel(job_id: str, clusters: str = "") -> None:
    """Cancel a job. One that has ended already is no error. SchedulerError where Slurm says that it knows none."""
    said = _answer(["scancel", *_at(clusters), job_id]).stderr
    if "invalid job id" in said.lower():  # scancel may exit with 0 all the same
        raise SchedulerError(f"scancel failed: {said.strip()}")


def dependents(job_id: str) -> dict[str, str]:
    """Return our waiting jobs that wait for the job `job_id`: id -> what each waits for, as sbatch takes it."""
    text = _run(["squeue", "--noheader", f"--user={os.getuid()}", "--states=PENDING", "--format=%i|%E"])
    pairs = (line.partition("|")[::2] for line in text.splitlines())
    waiting = {job: re.sub(r"\([^)]*\)", "", clauses) for job, clauses in pairs}  # afterok:7(unfulfilled)
    return {job: clauses for job, clauses in waiting.items() if _names(job_id).search(clauses)}


def wait_for(job_id: str, clauses: str, old: str, new: str) -> None:
    """Have a waiting job wait for the job `new` wherever its clauses name `old`."""
    changed = _names(old).sub(new, clauses)
    _run(["scontrol", "update", f"JobId={job_id}", f"Dependency={changed}"])


def _names(job_id: str) -> re.Pattern[str]:
    return re.compile(rf"(?<=:){re.escape(job_id)}(?![0-9_])")


def expected_start(script: str, clusters: str = "") -> str:
    """Return what `sbatch --test-only` says of a script: when and where it would start. Submits nothing."""
    return _answer(["sbatch", "--test-only", *_at(clusters)], stdin=script).stderr.strip().removeprefix("sbatch: ")


def partitions() -> list[Partition]:
    """Return the partitions that are up, in Slurm's order."""
    return parse_partitions(_run(["sinfo", "--noheader", "--format=%P|%a|%l|%D|%c|%m|%G"]))


def node_names(clusters: str = "") -> list[str]:
    """Return the names of the cluster's nodes."""
    lines = _run(["sinfo", *_at(clusters), "--noheader", "--Node", "--format=%N"]).splitlines()
    return list(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("CLUSTER: ")))


def host_names(hosts: str) -> list[str]:
    """Return the hosts of a host list, `node[1-2,7]`."""
    return _run(["scontrol", "show", "hostnames", hosts]).split()


def overlapping_step(job_id: str, hosts: Sequence[str], options: Sequence[str], *, terminal: bool) -> list[str]:
    """Return the srun command of a step with one task on each host, which shares all that the job's other steps have.

    `terminal`: the step gets a pseudo-terminal.
    """
    number = _run(["squeue", "--noheader", f"--jobs={job_id}", "--states=RUNNING", "--format=%A"]).strip()
    if not number.isdecimal():
        raise SchedulerError(f"job {job_id} is not running any more")
    size = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts)}", "--ntasks-per-node=1", f"--nodelist={','.join(hosts)}"]
    kind = ["--pty"] if terminal else []
    # srun takes an array's element by its own number only.
    return ["srun", f"--jobid={number}", "--overlap", "--export=ALL", *options, *size, "--chdir=/", *kind]


def srun_help() -> str:
    """Return srun's list of options, which includes those of plugins."""
    return _run(["srun", "--help"])


def _at(clusters: str) -> list[str]:
    return [f"--clusters={clusters}"] if clusters else []


def _is_several(clusters: str) -> bool:
    return "," in clusters or clusters.lower() == "all"


def _began(since: float) -> str:
    return "--starttime=" + time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(since - _CLOCK_SKEW_SECONDS))


def _run(command: Sequence[str], patience: float | None = None) -> str:
    return _answer(command, patience).stdout


def _answer(
    command: Sequence[str], patience: float | None = None, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    what, seconds = command[0], TIMEOUT_SECONDS if patience is None else patience
    try:
        done = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
            env={**clean_environment(), "SLURM_BITSTR_LEN": "0"},  # ids of arrays in full
        )
    except FileNotFoundError:
        raise SchedulerError(f"{what} is not on PATH; run this on a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{what} gave no answer within {seconds:g} s; Slurm may be overloaded") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SchedulerError(f"{what} failed: {said}")
    return done
