"""Restarts in place: a run that loses a rank or a node goes on in the same job, with the curve of an undisturbed one.

All of it is slow: by default the unit tests stand for the decisions, and the fault matrix for the faults.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from launcher.contract.copy_folder import MEMORY, PREFIX
from launcher.contract.job import AttemptName
from launcher.contract.rundir import RunPaths, checkpoint_step
from tests.slurm.cluster import SlurmCluster, why_unavailable
from tests.slurm.matrix import PATIENCE, TWO_RANKS, decided, job_of, rank_python, wait_for_decisions, wait_for_end
from tests.slurm.processes import wait_until
from tests.slurm.runs import Workbench, events, loss_curve, make_workbench, wait_for_checkpoint
from tests.slurm.test_faults import PYTHON_WITH_A_BAD_NODE

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(3600)]

IN_PLACE = (*TWO_RANKS, "restart.how=in_place", "resources.spare_nodes=1")
QUICK_WATCHDOG = ("watchdog.floor_seconds=15", "watchdog.checkpoint_seconds=60")
CHECKPOINTS = 24
"""Steps between checkpoints of runs that make copies."""
NO_BUDGET = ("restart.unknown=1000", "restart.communication=1000")
"""For kills that leave no time for progress."""


@dataclass(frozen=True)
class Bench:
    """A cluster, and the run that the others are compared with."""

    bench: Workbench
    undisturbed: RunPaths


@pytest.fixture(scope="module", params=["without-sacct", "with-sacct"])
def on(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    accounting = request.param == "with-sacct"
    if reason := why_unavailable(accounting=accounting):
        pytest.skip(reason)
    with SlurmCluster(tmp_path_factory.mktemp("inplace"), accounting=accounting) as cluster:
        bench = make_workbench(tmp_path_factory.mktemp("runs"), cluster)
        yield Bench(bench, wait_for_end(bench, bench.submit("undisturbed", *TWO_RANKS)))


def begin(on: Bench, name: str, *overrides: str) -> RunPaths:
    run = on.bench.submit(name, *IN_PLACE, *overrides)
    wait_for_checkpoint(run, PATIENCE)
    return run


def rank(run: RunPaths, number: int) -> int:
    return rank_python(job_of(run), rank=number, ranks=2)


def start_seconds(run: RunPaths) -> float:
    """How long the first ranks took from the script's start to training: the model's own start."""
    return float(events(run, "training_started")[0]["time"] - events(run, "attempt_started")[0]["time"])


def check(on: Bench, run: RunPaths, cause: str, since: float) -> None:
    """One restart in place, in time, in the same job, and the curve of the undisturbed run."""
    assert decided(run) == [(cause, "in_place"), ("done", "stop")]
    job = job_of(run)
    assert [event["attempt"] for event in events(run, "attempt_started")] == [f"{job}.0", f"{job}.0-1"]
    (restarted,) = events(run, "restarted_in_place")
    assert restarted["cause"] == cause
    took = restarted["time"] - since
    print(f"{run.name}: trained again {took:.1f} s later, own start {start_seconds(run):.1f} s; {restarted}")
    assert took < 60 + start_seconds(run)
    assert loss_curve(run) == loss_curve(on.undisturbed)
    assert not run.lease.exists()
    why = on.bench.launcher("status", "--why", str(run.root)).stdout
    assert "decision: in place on node" in why
    assert "the same job trains on: " in why


def test_killed_rank(on: Bench) -> None:
    run = begin(on, "killed")
    os.kill(rank(run, 1), signal.SIGKILL)
    since = time.time()
    wait_for_end(on.bench, run)
    check(on, run, "unknown", since)
    first, second = events(run, "attempt_started")
    assert first["nodes"] == second["nodes"]


def test_stopped_rank(on: Bench) -> None:
    run = begin(on, "stopped", *QUICK_WATCHDOG)
    os.kill(rank(run, 1), signal.SIGSTOP)
    wait_for_end(on.bench, run)
    (hang,) = events(run, "hang_detected")
    check(on, run, "hang", hang["time"])


@contextlib.contextmanager
def lost(on: Bench, node: str) -> Iterator[None]:
    """A power cut, and the node's return."""
    on.bench.cluster.kill_node(node)
    try:
        yield
    finally:
        on.bench.cluster.start_node(node)


def test_lost_node(on: Bench) -> None:
    """The spare node takes its place, long before a queue could."""
    run = begin(on, "lost")
    nodes = on.bench.cluster.nodes_of(job_of(run))
    since = time.time()
    with lost(on, nodes[1]):
        wait_for_end(on.bench, run)
    check(on, run, "node_failure", since)
    first, second = events(run, "attempt_started")
    assert (first["nodes"], second["nodes"]) == (",".join(nodes[:2]), f"{nodes[0]},{nodes[2]}")


def test_bad_node(on: Bench) -> None:
    """A node that fails its preflight is left out, although it answers; the spare one is looked at, too."""
    folder = on.bench.root / "bad"  # runs elsewhere must not learn of the node
    folder.mkdir()
    python = folder / "python"
    python.write_text(PYTHON_WITH_A_BAD_NODE)
    python.chmod(0o755)
    look = ("preflight.enabled=auto", "preflight.min_shm_mib=64", "preflight.timeout_seconds=240")
    state = {"XDG_STATE_HOME": str(folder / "state")}
    words = (*IN_PLACE, *look, f"cluster.runtime.python={python}", f"run_root={folder}")
    on.bench.submit("bad-node", *words, env=state)
    run = wait_for_end(on.bench, RunPaths(folder / "bad-node"))
    assert decided(run) == [("bad_node", "in_place"), ("done", "stop")]
    (failed,) = events(run, "preflight_failed")
    first, second = (event["nodes"].split(",") for event in events(run, "attempt_started"))
    bad = failed["nodes"][0]["host"]
    assert bad in first
    assert len(second) == 2
    assert bad not in second
    assert loss_curve(run) == loss_curve(on.undisturbed)


def test_lost_node_without_a_spare_one(on: Bench) -> None:
    """Slurm ends the job, as it does with restart.how requeue."""
    run = begin(on, "none-spare", "resources.spare_nodes=0")
    with lost(on, on.bench.cluster.nodes_of(job_of(run))[1]):
        wait_for_end(on.bench, run)
    causes = decided(run)
    assert causes[-1] == ("done", "stop")
    assert {decision for _, decision in causes[:-1]} <= {"requeue", "leave"}
    assert loss_curve(run) == loss_curve(on.undisturbed)


def test_two_nodes_lost_of_one_spare(on: Bench) -> None:
    """What cannot be done in place is requeued."""
    run = begin(on, "two-lost")
    nodes = on.bench.cluster.nodes_of(job_of(run))
    with lost(on, nodes[1]), lost(on, nodes[2]):
        wait_until(lambda: len(decided(run)) == 1, "the decision", timeout=PATIENCE)
    wait_for_end(on.bench, run)
    assert decided(run) == [("node_failure", "requeue"), ("done", "stop")]
    assert loss_curve(run) == loss_curve(on.undisturbed)


def test_lost_node_of_the_script(on: Bench) -> None:
    """Nobody is left to decide, and --no-kill keeps Slurm from ending the job: another node has it requeued."""
    run = begin(on, "script-lost")
    with lost(on, on.bench.cluster.nodes_of(job_of(run))[0]):
        wait_for_end(on.bench, run)
    assert decided(run) == [("node_failure", "leave"), ("done", "stop")]
    job = job_of(run)
    assert [event["attempt"] for event in events(run, "attempt_started")] == [f"{job}.0", f"{job}.1"]
    assert loss_curve(run) == loss_curve(on.undisturbed)


def test_rank_that_lives_on_a_node_without_an_answer(on: Bench) -> None:
    """Its node's slurmd is gone, so that nobody can end it. It wakes up when the others train again."""
    run = begin(on, "awake")
    cluster = on.bench.cluster
    node, old = cluster.nodes_of(job_of(run))[1], rank(run, 1)
    os.kill(old, signal.SIGSTOP)
    cluster.kill_slurmd(node)
    since = time.time()
    try:
        wait_until(lambda: bool(events(run, "restarted_in_place")), "training to go on", timeout=PATIENCE)
        os.kill(old, signal.SIGCONT)
        wait_for_end(on.bench, run)
    finally:
        cluster.kill_node(node)
        cluster.start_node(node)
    check(on, run, "node_failure", since)


COPIES = ("checkpoint.copy_every=2", f"checkpoint.every={CHECKPOINTS}")


def copies_of(run: RunPaths) -> list[Path]:
    """The folders with a job's copies in the memory of all nodes, which are one machine here."""
    return list(MEMORY.glob(f"{PREFIX}*-{job_of(run)}.0-*"))


def newest_copy(run: RunPaths) -> int:
    """The step of the newest copy of which any part is whole."""
    parts = (path.name.split(".")[0] for folder in copies_of(run) for path in folder.glob("step-*.json"))
    return max((checkpoint_step(Path(name)) for name in parts), default=0)


def begin_with_copies(on: Bench, name: str, *overrides: str) -> RunPaths:
    """A run that has a copy well after its newest checkpoint, and before its next one."""
    run = on.bench.submit(name, *IN_PLACE, *COPIES, *overrides)
    wait_until(lambda: newest_copy(run) > CHECKPOINTS + 2, f"copies of {name}", timeout=PATIENCE, interval=0.01)
    return run


def check_copies(on: Bench, run: RunPaths, cause: str, since: float, fetched: list[int]) -> None:
    """The restart went on from a copy, and nothing of copies is left."""
    check(on, run, cause, since)
    ((used,), (restarted,)) = events(run, "copy_used"), events(run, "restarted_in_place")
    assert used["fetched"] == fetched
    assert CHECKPOINTS < used["step"] == restarted["step"] < 2 * CHECKPOINTS
    assert restarted["steps_lost"] <= 4
    assert copies_of(run) == []


def test_killed_rank_goes_on_from_a_copy(on: Bench) -> None:
    run = begin_with_copies(on, "copied-killed")
    os.kill(rank(run, 1), signal.SIGKILL)
    since = time.time()
    wait_for_end(on.bench, run)
    check_copies(on, run, "unknown", since, [])


def test_lost_node_goes_on_from_its_neighbours_copy(on: Bench) -> None:
    run = begin_with_copies(on, "copied-lost")
    node = on.bench.cluster.nodes_of(job_of(run))[1]
    since = time.time()
    with lost(on, node):
        for folder in copies_of(run):
            if folder.name.endswith(f"-{node}"):
                shutil.rmtree(folder)
        wait_for_end(on.bench, run)
    check_copies(on, run, "node_failure", since, [1])


def test_copies_of_a_run_that_ends_by_a_fault_are_removed(on: Bench) -> None:
    run = begin_with_copies(on, "copied-ended", "restart.unknown=0")
    os.kill(rank(run, 1), signal.SIGKILL)
    wait_for_end(on.bench, run, "FAILED")
    assert decided(run) == [("unknown", "stop")]
    wait_until(lambda: copies_of(run) == [], "copies to go", timeout=60)


KILLS = int(os.environ.get("SFT_RANDOM_KILLS", "50"))
SEED = int(os.environ.get("SFT_RANDOM_SEED", "19"))
LONG = "train.max_steps=2000"
"""More than fifty kills leave time for."""


def test_random_kills(on: Bench, request: pytest.FixtureRequest) -> None:
    """At any moment: while ranks load, train or save, and while they come up after the kill before."""
    if "with-sacct" in request.node.name:
        pytest.skip("accounting has no part in it, and it takes a quarter of an hour")
    reference = on.bench.submit("reference", *TWO_RANKS, LONG)
    wait_for_end(on.bench, reference)
    chance = random.Random(SEED)
    run = on.bench.submit("random", *IN_PLACE, *NO_BUDGET, LONG, "resources.time=60")  # a busy machine needs it
    done = 0
    while done < KILLS and not events(run, "training_finished"):
        wait_until(lambda: bool(_process(run, 0)), "ranks", timeout=PATIENCE, interval=0.05)
        if chance.random() < 0.5:
            time.sleep(chance.uniform(0.0, 1.0) * start_seconds(reference))
        else:
            wait_until(lambda: _trains(run), "training", timeout=PATIENCE, interval=0.05)
            time.sleep(chance.uniform(0.0, 2.0))
        if _kill(run, chance.randrange(2)):
            done += 1
            wait_for_decisions(run, done)
    wait_for_end(on.bench, run)
    print(f"{done} kills, {len(events(run, 'restarted_in_place'))} restarts that trained")
    assert done == KILLS
    assert {decision for _, decision in decided(run)[:-1]} == {"in_place"}
    assert {AttemptName(event["attempt"]).restart for event in events(run, "attempt_started")} == {0}
    assert loss_curve(run) == loss_curve(reference)


def _trains(run: RunPaths) -> bool:
    """Whether the newest ranks train, or did and ended."""
    newest = events(run, "attempt_started")[-1]["attempt"]
    return any(event["attempt"] == newest for event in events(run, "training_started"))


def _process(run: RunPaths, number: int) -> int | None:
    """The process of a rank, if it lives."""
    try:
        return rank(run, number)
    except (AssertionError, OSError, IndexError):
        return None


def _kill(run: RunPaths, number: int) -> bool:
    """Kill a rank, if it lives."""
    process = _process(run, number)
    with contextlib.suppress(ProcessLookupError):
        if process is not None:
            os.kill(process, signal.SIGKILL)
            return True
    return False
