"""Run a program beside the ranks of a run: on their nodes, in the run's own allocation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from launcher.attempts.beside import MARK
from launcher.contract.errors import RunStateError, SchedulerError
from launcher.contract.job import Job
from launcher.contract.job_state import JobState
from launcher.contract.records import read_events
from launcher.contract.resources import checkout_root
from launcher.contract.rundir import JsonObject, RunPaths
from launcher.contract.spec import RunSpec, read_resolved
from launcher.runs.snapshot import snapshot
from launcher.runs.state import collect
from launcher.scheduler.factory import scheduler_of
from launcher.scheduler.slurm.environment import clean_environment
from launcher.submission.render_script import python_beside

_SECONDS = 60.0
"""For all nodes to answer; Slurm takes a second or two to start a step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveAttempt:
    """An attempt that is running now."""

    paths: RunPaths
    spec: RunSpec
    job: Job
    name: str
    hosts: tuple[str, ...]
    ranks: int
    """Number of ranks that the run has."""


def live_attempt(paths: RunPaths) -> LiveAttempt:
    """Return the attempt of a run that is running. Raise RunStateError where none is."""
    (row,), problem = collect([paths], fresh=True)
    if problem is not None:
        raise SchedulerError(problem)
    if row.state is not JobState.RUNNING:
        raise RunStateError(
            f"run {row.run} is {row.state.value}{f' ({row.reason})' if row.reason else ''}: no rank runs"
        )
    item = snapshot(paths)
    if item.job is None or item.attempt is None:
        raise RunStateError(f"run {row.run} has only just begun: no rank runs yet")
    started = [event for event in read_events(paths) if event["event"] == "attempt_started"]
    nodes = next((str(event.get("nodes", "")) for event in reversed(started) if event["attempt"] == item.attempt), "")
    return LiveAttempt(
        paths=paths,
        spec=read_resolved(paths.config),
        job=item.job,
        name=item.attempt,
        hosts=tuple(scheduler_of(item.job.id.scheduler).host_names(nodes)) if nodes else ("",),
        ranks=int(item.manifest.topology["world_size"]),
    )


def ask_ranks(live: LiveAttempt) -> list[JsonObject]:
    """Return what the ranks of all nodes say, as `launcher.attempts.beside stacks` prints it.

    Raise SchedulerError where no node could be asked.
    """
    step = scheduler_of(live.job.id.scheduler).beside(live.job, live.hosts, live.spec.cluster.srun_args)
    words = [*step, sys.executable, *_program(live, "stacks")]
    process = subprocess.Popen(
        words,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=_environment(live, in_container=False),
        text=True,
        errors="replace",
    )
    late = ""
    try:
        printed, said = process.communicate(timeout=_SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()  # srun then ends its step
        printed, said = process.communicate()
        late = f"not all of {len(live.hosts)} nodes answered within {_SECONDS:g} s\n"
    lines = [line.removeprefix(MARK) for line in printed.splitlines() if line.startswith(MARK)]
    if not lines and (late or process.returncode):
        raise SchedulerError(f"the ranks could not be asked: {late}{said.strip()}")
    return [json.loads(line) for line in lines]


def shell_words(live: LiveAttempt, rank: int, program: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command, and its environment, of a shell or a program beside a rank.

    Raise RunStateError where the rank does not run.
    """
    if not 0 <= rank < live.ranks:
        raise RunStateError(f"run {live.paths.name} has ranks 0 to {live.ranks - 1}, and no rank {rank}")
    host = next((str(line["host"]) for line in ask_ranks(live) if line.get("rank") == rank and "host" in line), None)
    if host is None:
        raise RunStateError(f"rank {rank} does not run: attempt {live.name} is preparing, loading or ending")
    options, python = python_beside(live.spec, live.paths, sys.executable)
    terminal = not program and sys.stdin.isatty()
    step = scheduler_of(live.job.id.scheduler).beside(live.job, [host], options, terminal=terminal)
    inner = [f"--rank={rank}", *(["--", *program] if program else [])]
    return [*step, *python, *_program(live, "shell"), *inner], _environment(
        live, in_container=python != [sys.executable]
    )


def _program(live: LiveAttempt, what: str) -> list[str]:
    return ["-m", "launcher.attempts.beside", what, str(live.paths.root), f"--attempt={live.name}"]


def _environment(live: LiveAttempt, *, in_container: bool) -> dict[str, str]:
    """Return our environment, with this launcher's code, or in a container, which sees no other, the run's copy."""
    environment = clean_environment()
    code = live.paths.code if in_container and live.paths.code.is_file() else checkout_root()
    if code is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(code), *filter(None, [environment.get("PYTHONPATH")])])
    return environment
