"""The state of a run, from what the scheduler says and from the run's own files."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from launcher.commands.arguments import json_text
from launcher.contract.job import Job, JobId
from launcher.contract.job_state import JobState
from launcher.contract.jsonable import jsonable
from launcher.contract.lease import Owner, take
from launcher.contract.manifest import Manifest, read_manifest, write_manifest
from launcher.contract.processes import start_ticks
from launcher.contract.rundir import COMPLETE, RunPaths, append_event, write_json
from launcher.runs.find import all_runs, find_run
from launcher.runs.listing import listing
from launcher.runs.state import RunStatus, collect
from launcher.views.status_table import status_table
from launcher.views.text import duration
from tests.launcher.conftest import Commands


def make_run(root: Path, name: str, **recorded: Any) -> RunPaths:
    """A run directory with one job."""
    paths = RunPaths(root / name)
    paths.logs.mkdir(parents=True)
    job = Job.from_json({"job_id": "7", "scheduler": "slurm", "submitted_at": 1.0, **recorded})
    manifest = Manifest(
        name=name,
        created_at=1.0,
        submitter="me",
        host="login",
        command=("launcher", "submit"),
        versions={},
        source={},
        topology={"summary": "tp2 = 2 ranks"},
        jobs=(job,),
    )
    write_manifest(paths, manifest)
    return paths


def started(paths: RunPaths, attempt: str = "7.0", job_id: str = "7") -> None:
    append_event(paths, "attempt_started", attempt=attempt, job_id=job_id)


def ended(paths: RunPaths, exit_code: int, attempt: str = "7.0") -> None:
    append_event(paths, "attempt_ended", attempt=attempt, exit_code=exit_code)


def state_of(paths: RunPaths) -> tuple[JobState, str]:
    ((row,), _) = collect([paths])
    return row.state, row.reason


@pytest.fixture
def silent(commands: Commands) -> Commands:
    """A Slurm that knows no job."""
    commands.add("squeue", "")
    commands.add("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    return commands


def squeue_says(commands: Commands, state: str, reason: str = "None", name: str = "a") -> None:
    commands.add("squeue", f"echo '7|{state}|{reason}|2026-01-01T00:00:00|{name}'")


def test_one_squeue_and_one_sacct_for_all_runs(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "echo '1|RUNNING|None|N/A|run1'; echo '2|PENDING|Priority|N/A|run2'")
    commands.add("sacct", "printf 'JobID|State|ExitCode|Start|JobName\\n3|TIMEOUT|0:0|N/A|run3\\n'")
    runs = [make_run(tmp_path, f"run{number}", job_id=str(number)) for number in range(5)]
    started(runs[0], "0.0", "0")
    ended(runs[0], 0, "0.0")  # known to be over: nobody is asked
    rows, problem = collect(runs)
    assert problem is None
    assert [row.state.value for row in rows] == ["COMPLETED", "RUNNING", "PENDING", "TIMEOUT", "UNKNOWN"]
    assert len(commands.calls("squeue")) == 1
    assert [call.split("--jobs=")[1].split()[0] for call in commands.calls("sacct")] == ["3,4"]


@pytest.mark.parametrize(
    ("exit_code", "state", "reason"),
    [
        (0, JobState.COMPLETED, ""),
        (75, JobState.INTERRUPTED, "ended with exit code 75 (stopped on request, checkpoint complete)"),
        (74, JobState.FAILED, "ended with exit code 74 (could not write; is the disk full?)"),
        (2, JobState.FAILED, "ended with exit code 2 (bad input)"),
        (137, JobState.FAILED, "ended with exit code 137 (signal 9)"),
        (152, JobState.FAILED, "ended with exit code 152 (signal 24: a limit of CPU time, `ulimit -t`)"),
        (17, JobState.FAILED, "ended with exit code 17"),
    ],
)
def test_forgotten_job_is_judged_by_its_own_last_word(
    tmp_path: Path, silent: Commands, exit_code: int, state: JobState, reason: str
) -> None:
    paths = make_run(tmp_path, "a")
    assert state_of(paths) == (
        JobState.UNKNOWN,
        "Slurm no longer knows the job, which did not record how it ended",
    )
    started(paths)
    assert state_of(paths)[0] is JobState.UNKNOWN
    ended(paths, exit_code)
    assert state_of(paths) == (state, reason)


def test_a_run_that_started_again_in_place_is_at_work(tmp_path: Path, silent: Commands) -> None:
    """Between two starts of the ranks as well: the end of the attempt before settles nothing."""
    squeue_says(silent, "RUNNING")
    paths = make_run(tmp_path, "a")
    started(paths)
    append_event(paths, "restart_decided", attempt="7.0", decision="in_place", cause="hang")
    ended(paths, 76)
    assert state_of(paths) == (JobState.RUNNING, "preparing")
    started(paths, "7.0-1")
    append_event(paths, "training_started", attempt="7.0-1", step=0)
    assert state_of(paths) == (JobState.RUNNING, "training, restart 1 in place")


def test_rank_that_failed_first_is_named(tmp_path: Path, silent: Commands) -> None:
    paths = make_run(tmp_path, "a")
    started(paths)
    ended(paths, 1)
    (paths.logs / "7.0").mkdir()
    (paths.logs / "7.0" / "failure").write_text("1 3 node2\n")
    assert state_of(paths)[1] == "rank 3 on node2 ended with exit code 1"


@pytest.mark.parametrize(
    ("slurm", "reason", "state", "shown"),
    [
        ("RUNNING", "None", JobState.RUNNING, "training"),
        ("PENDING", "Resources", JobState.PENDING, "Resources"),
        ("PENDING", "JobHeldAdmin", JobState.HELD, "JobHeldAdmin: waits for `scontrol release 7`"),
        ("CANCELLED", "Resources", JobState.CANCELLED, ""),
        ("OUT_OF_MEMORY", "OutOfMemory", JobState.OUT_OF_MEMORY, "OutOfMemory"),
        ("FAILED", "NonZeroExitCode", JobState.FAILED, "NonZeroExitCode"),
        ("COMPLETED", "None", JobState.COMPLETED, ""),
    ],
)  # fmt: skip
def test_slurms_word_counts(
    tmp_path: Path, commands: Commands, slurm: str, reason: str, state: JobState, shown: str
) -> None:
    squeue_says(commands, slurm, reason)
    paths = make_run(tmp_path, "a")
    started(paths)
    append_event(paths, "training_started", attempt="7.0", step=0)
    assert state_of(paths) == (state, shown)


def test_failed_job_that_stopped_on_request_is_interrupted(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "FAILED", "NonZeroExitCode")
    paths = make_run(tmp_path, "a")
    started(paths)
    ended(paths, 75)
    assert state_of(paths)[0] is JobState.INTERRUPTED


def test_a_job_that_ends_between_the_two_looks_is_judged_by_its_own_word(tmp_path: Path, commands: Commands) -> None:
    """The run's files are read first, then Slurm is asked, which knows less of why it ended."""
    paths = make_run(tmp_path, "a")
    started(paths)
    end = json.dumps({"time": 2.0, "event": "attempt_ended", "attempt": "7.0", "exit_code": 75})
    commands.add("squeue", f"echo '{end}' >>{paths.events}; echo '7|FAILED|NonZeroExitCode|N/A|a'")
    assert state_of(paths)[0] is JobState.INTERRUPTED


def test_requeued_job_is_not_judged_by_its_first_attempt(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "PENDING", "BeginTime")
    paths = make_run(tmp_path, "a")
    started(paths)
    ended(paths, 143)
    state, reason = state_of(paths)
    assert (state, reason.partition(":")[0]) == (JobState.PENDING, "BeginTime")
    started(paths, "7.1")
    squeue_says(commands, "RUNNING")
    ((row,), _) = collect([paths])
    assert (row.state, row.attempt, row.exit_code) == (JobState.RUNNING, "7.1", None)


def test_two_schedulers_are_asked_once_each(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "RUNNING")
    names = [make_run(tmp_path, name) for name in ("a", "b")]
    mine = {"scheduler": "local", "job_id": "4194305", "host": socket.gethostname(), "process_start": 1}
    rows, problem = collect([names[0], make_run(tmp_path, "c", **mine), names[1]])
    assert problem is None
    assert [(row.run, row.state.value) for row in rows] == [("a", "RUNNING"), ("c", "FAILED"), ("b", "UNKNOWN")]
    assert len(commands.calls("squeue")) == 1


def test_job_id_that_slurm_gave_to_somebody_else(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "RUNNING", name="somebody-else")
    assert state_of(make_run(tmp_path, "a"))[0] is JobState.UNKNOWN


def test_job_submitted_by_hand_is_found_by_its_event(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "echo '9|RUNNING|None|N/A|a'")
    paths = make_run(tmp_path, "a")
    started(paths, "9.0", "9")
    ((row,), _) = collect([paths])
    assert (row.state, row.job) == (JobState.RUNNING, "9")


def test_unreachable_slurm_is_unknown_with_its_words(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    rows, problem = collect([make_run(tmp_path, "a")])
    assert problem == "squeue failed: Unable to contact slurm controller"
    assert (rows[0].state, rows[0].reason) == (JobState.UNKNOWN, problem)


def test_local_process(tmp_path: Path) -> None:
    me = {"scheduler": "local", "job_id": str(os.getpid()), "host": socket.gethostname()}
    alive = make_run(tmp_path, "alive", **me, process_start=start_ticks(os.getpid()))
    assert state_of(alive)[0] is JobState.RUNNING
    reused = make_run(tmp_path, "reused", **me, process_start=1)
    assert state_of(reused) == (JobState.FAILED, f"process {os.getpid()} is gone and did not record how it ended")
    elsewhere = make_run(tmp_path, "elsewhere", **{**me, "host": "other"}, process_start=1)
    assert state_of(elsewhere) == (JobState.UNKNOWN, "it runs on other; look there")
    started(reused, "local-1", str(os.getpid()))
    ended(reused, 0, "local-1")
    assert state_of(reused) == (JobState.COMPLETED, "")


def test_cancelled_job_that_was_killed_before_its_last_word(tmp_path: Path, silent: Commands) -> None:
    paths = make_run(tmp_path, "a")
    started(paths)
    append_event(paths, "cancelled", job_id="7")
    assert state_of(paths) == (JobState.CANCELLED, "by `launcher cancel`")
    assert listing([paths])[0].state == "CANCELLED"


def test_cancelled_local_run(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "a", scheduler="local", host=socket.gethostname())
    started(paths, "local-1")
    append_event(paths, "cancelled", job_id="7")
    ended(paths, 75, "local-1")
    assert state_of(paths) == (JobState.CANCELLED, "by `launcher cancel`")


def test_progress_and_checkpoint_are_shown(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "RUNNING")
    paths = make_run(tmp_path, "a")
    started(paths)
    progress = {"step": 5, "max_steps": 20, "loss": 1.23456, "tokens_per_second": 12345.6, "eta_seconds": 3725}
    write_json(paths.progress, progress)
    for step, complete in ((2, True), (4, True), (5, False)):
        paths.checkpoint(step).mkdir(parents=True)
        if complete:
            (paths.checkpoint(step) / COMPLETE).touch()
    (head, line) = status_table(collect([paths])[0]).splitlines()
    assert " ".join(head.split()) == "RUN STATE ATTEMPT JOB STEP LOSS TOKENS/S MFU ETA CHECKPOINT REASON"
    assert " ".join(line.split()) == "a RUNNING 7.0 7 5/20 1.2346 12,346 - 1:02:05 step-00000004 preparing"


def test_a_run_whose_ranks_are_all_stopped_is_told(tmp_path: Path, commands: Commands) -> None:
    """Nobody is left in it who could notice."""
    squeue_says(commands, "RUNNING")
    paths = make_run(tmp_path, "a")
    started(paths)
    take(paths, Owner(attempt="7.0", job_id="7"))
    old = time.time() - 26 * 60
    os.utime(paths.lease, (old, old))
    assert state_of(paths)[1] == "preparing"  # nobody renews it there
    append_event(paths, "training_started", attempt="7.0", step=0)
    assert state_of(paths)[1] == "training; no sign of life for 26 min, its ranks may be stopped"
    os.utime(paths.lease)
    assert state_of(paths)[1] == "training"


def test_unreadable_run_does_not_hide_the_others(tmp_path: Path, silent: Commands) -> None:
    broken = make_run(tmp_path, "broken")
    broken.manifest.write_text("{")
    rows, _ = collect([broken, make_run(tmp_path, "fine")])
    assert [row.run for row in rows] == ["broken", "fine"]
    assert rows[0].reason.startswith(f"unreadable: {broken.manifest} cannot be read: ")


def test_json_of_a_row() -> None:
    row = RunStatus(run="a", directory="/r/a", state=JobState.RUNNING, step=1)
    assert json.loads(json_text(row))["state"] == "RUNNING"
    assert set(json.loads(json_text(row))) == {item.name for item in dataclasses.fields(RunStatus)}


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0, 61, 3600, 86400.9)] == ["0:00", "1:01", "1:00:00", "24:00:00"]


def test_finding_runs(tmp_path: Path) -> None:
    first = make_run(tmp_path, "b-first")
    second = make_run(tmp_path, "a-second")
    (tmp_path / "no-run").mkdir()
    assert [paths.name for paths in all_runs(tmp_path)] == ["b-first", "a-second"]
    assert all_runs(tmp_path / "absent") == []
    assert find_run("b-first", tmp_path) == find_run(str(first.root), Path("elsewhere")) == first
    assert read_manifest(second).jobs[0].id == JobId("7", "slurm")
    with pytest.raises(
        Exception, match=r"^no run 'b-frist' in .*; did you mean 'b-first'\? \(--run-root or SFT_RUN_ROOT"
    ):
        find_run("b-frist", tmp_path)


def test_listing_asks_nobody(tmp_path: Path) -> None:
    paths = make_run(tmp_path, "a")
    assert listing([paths])[0].state is None
    started(paths)
    assert (listing([paths])[0].state, listing([paths])[0].phase) == (None, "preparing")
    ended(paths, 0)
    assert jsonable(listing([paths])[0]) == {
        "run": "a",
        "directory": str(paths.root),
        "state": "COMPLETED",
        "phase": "preparing",
        "created_at": 1.0,
        "topology": "tp2 = 2 ranks",
        "parent_run": None,
    }


def test_a_run_that_cannot_be_read_does_not_hide_the_others(tmp_path: Path) -> None:
    whole, damaged = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    damaged.manifest.write_text("{")
    rows = listing([damaged, whole])
    assert [row.state for row in rows] == ["UNKNOWN", None]
    assert rows[0].topology.startswith("unreadable: ")


TOKEN, OTHER = f"sft-{'a' * 32}", f"sft-{'b' * 32}"


@pytest.mark.parametrize(
    ("name", "comment", "state"),
    [
        ("renamed", TOKEN, JobState.HELD),
        ("renamed", f"mine {TOKEN}", JobState.HELD),
        ("a", "the comment was changed", JobState.HELD),
        ("a", OTHER, JobState.UNKNOWN),  # Slurm's ids wrap around: another run's job, although its name is ours
        ("renamed", "and the comment was changed", JobState.UNKNOWN),
    ],
)
def test_the_token_tells_whose_job_it_is(
    tmp_path: Path, commands: Commands, name: str, comment: str, state: JobState
) -> None:
    commands.add("sacct", "exit 1")
    commands.add("squeue", f"echo '7|PENDING|JobHeldUser [(null)]|N/A|{name}|{comment}'")
    assert state_of(make_run(tmp_path, "a", token=TOKEN))[0] is state


def test_accounting_tells_by_the_command_line_whose_job_it_is(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "")
    head = "JobID|State|ExitCode|Start|JobName|SubmitLine"
    commands.add("sacct", f"echo '{head}'; echo '7|TIMEOUT|0:0|N/A|renamed|sbatch --comment={TOKEN} /r/job.sh'")
    assert state_of(make_run(tmp_path, "a", token=TOKEN))[0] is JobState.TIMEOUT
    assert state_of(make_run(tmp_path, "b", token=OTHER))[0] is JobState.UNKNOWN


def test_each_cluster_is_asked_for_its_own_jobs(tmp_path: Path, commands: Commands) -> None:
    """Job 7 of one cluster runs, job 7 of the other waits, and the third cluster does not answer."""
    commands.add("sacct", "")
    commands.add("scontrol", "echo 'ClusterName             = near'")
    commands.add(
        "squeue",
        """case "$*" in
        --clusters=far*) echo '7|PENDING|Priority [(null)]|N/A|far|(null)' ;;
        --clusters=lost*) echo 'squeue: error: no such cluster' >&2; exit 1 ;;
        --clusters=*) exit 1 ;;
        *) echo '7|RUNNING|None [(null)]|N/A|near|(null)' ;;
        esac""",
    )
    runs = [make_run(tmp_path, name, cluster=name) for name in ("near", "far", "lost")]
    rows, problem = collect(runs)
    assert [row.state for row in rows] == [JobState.RUNNING, JobState.PENDING, JobState.UNKNOWN]
    assert problem == "squeue failed: squeue: error: no such cluster"
    assert "7;far" in status_table(rows)


def test_a_job_that_the_run_submitted_itself_is_known_with_its_cluster(tmp_path: Path, commands: Commands) -> None:
    commands.add("sacct", "")
    commands.add("scontrol", "echo 'ClusterName = near'")
    commands.add("squeue", f"echo '9|RUNNING|None [(null)]|N/A|renamed|{TOKEN}'")
    paths = make_run(tmp_path, "a")
    append_event(paths, "submitted", job_id="9", scheduler="slurm", by="7.0", token=TOKEN, cluster="near")
    assert state_of(paths)[0] is JobState.RUNNING
    assert all("--clusters" not in call for call in commands.calls("squeue"))  # it is the one at hand


def test_numbers_of_an_earlier_attempt_are_not_shown(tmp_path: Path, commands: Commands) -> None:
    squeue_says(commands, "RUNNING")
    paths = make_run(tmp_path, "a")
    paths.checkpoint(40).mkdir(parents=True)
    (paths.checkpoint(40) / COMPLETE).touch()
    numbers = {"max_steps": 60, "step": 45, "loss": 1.5, "tokens_per_second": 9.0, "mfu": 0.4, "eta_seconds": 5.0}
    write_json(paths.progress, {"attempt": "7.0", **numbers})
    started(paths)
    ((row,), _) = collect([paths])
    assert (row.step, row.loss, row.tokens_per_second, row.mfu, row.eta_seconds) == (45, 1.5, 9.0, 0.4, 5.0)
    started(paths, "7.1")
    ((row,), _) = collect([paths])
    assert (row.step, row.max_steps) == (40, 60)  # where it goes on
    assert (row.loss, row.tokens_per_second, row.mfu, row.eta_seconds) == (None, None, None, None)


def test_the_first_errors_sentence_is_the_reason(tmp_path: Path, silent: Commands) -> None:
    paths = make_run(tmp_path, "a")
    started(paths)
    ended(paths, 2)
    (paths.logs / "7.0").mkdir()
    error = {
        "rank": 0,
        "host": "n",
        "kinds": ["DataError", "ConfigError", "LauncherError"],
        "message": "no.jsonl: gone\nx",
    }
    write_json(paths.error("7.0"), error)
    assert state_of(paths) == (JobState.FAILED, "no.jsonl: gone (exit code 2, bad input)")
    (paths.logs / "7.0" / "failure").write_text("2 0 node2\n")
    write_json(paths.error("7.0"), {**error, "kinds": ["ZeroDivisionError"], "message": "division by zero"})
    assert state_of(paths)[1] == "rank 0 on node2: ZeroDivisionError: division by zero (exit code 2, bad input)"
    (paths.logs / "7.0" / "failure").write_text("137 1 node3\n")  # rank 0 failed because rank 1 was killed
    assert state_of(paths)[1] == "rank 1 on node3 ended with exit code 2 (bad input)"


def test_the_batch_scripts_own_words_are_the_reason(tmp_path: Path, silent: Commands) -> None:
    paths = make_run(tmp_path, "a")
    started(paths)
    append_event(paths, "attempt_ended", attempt="7.0", exit_code=1, detail="module load cuda failed")
    assert state_of(paths) == (JobState.FAILED, "module load cuda failed (exit code 1)")
