"""Rows of the fault matrix, worked on at the same time: most of a fault's time is waiting for Slurm to notice it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launcher.contract.rundir import RunPaths
from tests.slurm.processes import pids_with, wait_until
from tests.slurm.runs import CHECKOUT, Workbench, events

PATIENCE = 900.0
"""Seconds for one thing to happen to a run, the wait for nodes included, while others use the machine."""

Row = Callable[[Workbench], RunPaths]
"""Submits a run, interferes with it, and returns it once it has ended."""

_AT_ONCE = 3

TWO_RANKS = (
    "resources.tasks_per_node=1",
    "topology.tensor_parallel=1",
    "topology.sequence_parallel=false",
    "checkpoint.export=false",
)
"""One rank on each of two nodes: half the work of starting, for faults that do not ask for more."""


class Matrix:
    """Begins to work on `rows` at once; `run` waits for one of them."""

    def __init__(self, bench: Workbench, rows: Collection[Row]) -> None:
        self.bench = bench
        self._pool = ThreadPoolExecutor(_AT_ONCE)
        self._runs: Mapping[Row, Future[RunPaths]] = {row: self._pool.submit(row, bench) for row in dict.fromkeys(rows)}

    def run(self, row: Row) -> RunPaths:
        """Return the row's run, with whatever went wrong on its way."""
        return self._runs[row].result(timeout=4 * PATIENCE)

    def stop(self) -> None:
        """Begin no more rows, and end those that are under way: nobody waits for them any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.bench.cluster.run(["scancel", "--user=root"])
        self._pool.shutdown()


def decided(run: RunPaths) -> list[tuple[str, str]]:
    """Return cause and decision of every attempt so far."""
    return [(event["cause"], event["decision"]) for event in events(run, "restart_decided")]


def wait_for_decisions(run: RunPaths, count: int) -> dict[str, Any]:
    """Wait for and return the decision about attempt number `count`."""
    wait_until(lambda: len(decided(run)) >= count, f"{count} decisions of {run.name}", timeout=PATIENCE)
    return events(run, "restart_decided")[count - 1]


def wait_for_end(bench: Workbench, run: RunPaths, state: str = "COMPLETED", attempts: int = 1) -> RunPaths:
    """Wait until an attempt, the `attempts`th or a later one, is the last, and the run is in `state`.

    The run's own files are looked at while it works: asking the launcher all the time would be most of the load.
    """

    def is_over() -> bool:
        last = events(run, "restart_decided")[-1:]
        stopped = bool(last) and last[0]["decision"] in ("stop", "withdraw")
        ended = {event["attempt"] for event in events(run, "attempt_ended")}
        return stopped and len(decided(run)) >= attempts and last[0]["attempt"] in ended

    try:
        wait_until(is_over, f"{run.name} to end", timeout=PATIENCE)
        bench.wait_for_state(run, state)
    except TimeoutError as late:
        told = bench.launcher("status", "--why", str(run.root)).stdout
        raise AssertionError(f"{late}\n{told}\n{bench.log(run)}") from None
    return run


def job_of(run: RunPaths) -> str:
    """Return the newest job of a run."""
    return str(events(run, "submitted")[-1]["job_id"])


def started_after(run: RunPaths) -> list[int]:
    """Return the steps that were done when each attempt began to train."""
    return [event["step"] for event in events(run, "training_started")]


def stopped_after(run: RunPaths) -> list[int]:
    """Return the steps that were done when an attempt stopped in order."""
    return [event["step"] for event in events(run, "stop_requested")]


def rank_processes(job: str, rank: int, ranks: int) -> list[int]:
    """Return all processes of a rank in the training step: its shell and its Python."""
    return list(pids_with({"SLURM_JOB_ID": job, "SLURM_PROCID": str(rank), "SLURM_NTASKS": str(ranks)}))


def rank_python(job: str, rank: int, ranks: int) -> int:
    """Return the Python process of a rank in the training step."""
    for pid in rank_processes(job, rank, ranks):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"train" in words and b"python" in words[0]:
            return pid
    raise AssertionError(f"no process of rank {rank} in job {job}")


def start_launcher(
    bench: Workbench, output: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a launcher beside this process, which prints into `output`."""
    command = [sys.executable, "-m", "launcher", *arguments]
    with output.open("wb") as file:
        return subprocess.Popen(
            command, env={**bench.cluster.env, **(env or {})}, cwd=CHECKOUT, stdout=file, stderr=subprocess.STDOUT
        )
