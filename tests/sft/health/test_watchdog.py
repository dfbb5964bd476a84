"""The watchdog: how long is too long, who is behind, and ranks that really hang."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from launcher.contract.exit_codes import ExitCode
from launcher.contract.local_ranks import run_ranks
from launcher.contract.rundir import RunPaths, read_json, read_lines
from launcher.contract.spec import WatchdogSpec
from sft.health.rank_positions import Phase, Position, ranks_behind
from sft.health.watchdog import Allowance
from tests.tiers import thinned

CHECKOUT = Path(__file__).parents[3]

HANGING = """
import os, sys, time
from pathlib import Path
import torch.distributed as dist
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import WatchdogSpec
from sft.health.rank_positions import Phase
from sft.runtime.rank_env import RankEnv
from sft.health.watchdog import Watchdog

seconds = dict(floor_seconds=3.0, first_step_seconds=3.0, evaluation_seconds=60.0, checkpoint_seconds=60.0)
env = RankEnv.from_environ()
with Watchdog(WatchdogSpec(multiple=2.0, **seconds), RunPaths(Path(sys.argv[1])), env) as watchdog:
    dist.init_process_group("gloo", rank=env.rank, world_size=env.world_size)
    watchdog.joined()
    dist.barrier()
    watchdog.enter(Phase.STEP, 3)
    print("ready", flush=True)
    if env.rank == 1:
        ACTION
    dist.barrier()
"""


def test_allowance_follows_the_median_and_has_a_floor() -> None:
    allowance = Allowance(WatchdogSpec(multiple=10, floor_seconds=30, first_step_seconds=500, evaluation_seconds=700))
    assert allowance.of(Phase.STEP, step_is_first=True) == 500
    for seconds in (1.0, 2.0, 60.0):
        allowance.add(seconds)
    assert allowance.of(Phase.STEP, step_is_first=False) == 30
    for _ in range(4):
        allowance.add(9.0)
    assert allowance.of(Phase.DATA, step_is_first=False) == 90
    assert allowance.of(Phase.EVALUATION, step_is_first=False) == 700


def position(rank: int, **fields: object) -> Position:
    values: Mapping[str, object] = {"step": 3, "phase": "STEP", "answered": True, "waiting": True, **fields}
    return Position(rank=rank, host=f"node{rank}", pid=1, **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("odd", "expected"),
    [
        ({"answered": False, "phase": "CHECKPOINT"}, [1]),
        ({"step": 2, "phase": "CHECKPOINT"}, [1]),
        ({"phase": "DATA"}, [1]),
        ({"waiting": False}, [1]),
        ({}, [0, 1, 2]),
    ],
)
def test_who_is_behind(odd: Mapping[str, object], expected: list[int]) -> None:
    ranks = [position(0), position(1, **odd), position(2)]
    assert [place.rank for place in ranks_behind(ranks)] == expected


def hang(tmp_path: Path, action: str, ranks: int = 2) -> tuple[int, RunPaths]:
    """Exit code and run directory of ranks of which rank 1 does `action` in step 4."""
    paths = RunPaths(tmp_path / "run")
    paths.logs.mkdir(parents=True)
    command = [sys.executable, "-c", HANGING.replace("ACTION", action), str(paths.root)]
    path = os.pathsep.join([str(CHECKOUT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    variables = {"SFT_ATTEMPT": "a", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": path}
    return run_ranks(command, ranks, paths.logs / "a", grace=0.5, variables=variables), paths


ACTIONS = {
    "sleeps": "time.sleep(3600)",
    "is stopped": "os.kill(os.getpid(), 19)",
    "keeps the GIL": "sum(range(10**14))  # no Python bytecode runs meanwhile",
}


@pytest.mark.parametrize("what", thinned(ACTIONS, "keeps the GIL", "is stopped"))
def test_a_rank_that_hangs_is_named(what: str, tmp_path: Path) -> None:
    code, paths = hang(tmp_path, ACTIONS[what])
    assert code == ExitCode.HANG, paths.rank_log("a", 0).read_text()
    (event,) = read_lines(paths.events)
    assert (event["event"], event["told_apart"], event["step"]) == ("hang_detected", True, 3)
    assert [place["rank"] for place in event["behind"]] == [1]
    assert event["behind"][0]["answered"] is (what == "sleeps")
    assert (paths.logs / "a" / "failure").read_text().split()[:2] == ["76", "1"]
    assert len(read_json(paths.logs / "a" / "hang.json") or []) == 2
    assert "in barrier" in paths.stacks("a", 0).read_text()
    stacks = paths.stacks("a", 1).read_text()
    if what == "is stopped":
        assert "stopped" in event["behind"][0]["process"]
    else:
        assert 'File "<string>", line 20 in <module>' in stacks


@pytest.mark.slow  # the store's calls have to time out
def test_a_rank_that_is_stopped_in_a_save_is_named_long_before_a_save_is_overdue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save may take an hour by default, and so long did a stopped rank go unnoticed."""
    monkeypatch.setitem(globals(), "HANGING", HANGING.replace("enter(Phase.STEP, 3)", "enter(Phase.CHECKPOINT, 3)"))
    began = time.monotonic()
    code, paths = hang(tmp_path, ACTIONS["is stopped"])
    assert code == ExitCode.HANG, paths.rank_log("a", 0).read_text()
    assert time.monotonic() - began < 50, "a save may take 60 seconds here"
    (event,) = read_lines(paths.events)
    assert [place["rank"] for place in event["behind"]] == [1]
    assert "stopped" in event["behind"][0]["process"]


def on_two_nodes(monkeypatch: pytest.MonkeyPatch, each: int) -> None:
    """Have each so many ranks of `hang` believe that they have a node of their own, and that they are in a save."""
    place = f"local_rank=int(os.environ['RANK']) % {each}, local_world_size={each}"
    env = f"import dataclasses\nenv = dataclasses.replace(RankEnv.from_environ(), {place})"
    program = HANGING.replace("env = RankEnv.from_environ()", env).replace("Phase.STEP, 3", "Phase.CHECKPOINT, 3")
    monkeypatch.setitem(globals(), "HANGING", program)


FOUR_RANKS = pytest.param(2, marks=pytest.mark.slow)  # four processes that import torch


@pytest.mark.parametrize("each", [1, FOUR_RANKS])
def test_a_node_whose_ranks_are_all_stopped_in_a_save_is_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, each: int
) -> None:
    on_two_nodes(monkeypatch, each)
    began = time.monotonic()
    stop = f"pass\n    if env.rank >= {each}: time.sleep(3); os.kill(os.getpid(), 19)"
    code, paths = hang(tmp_path, stop, ranks=2 * each)
    assert code == ExitCode.HANG, paths.rank_log("a", 0).read_text()
    assert time.monotonic() - began < 55, "a save may take 60 seconds here"
    (event,) = read_lines(paths.events)
    behind = [(place["rank"], place["answered"]) for place in event["behind"]]
    assert behind == [(rank, False) for rank in range(each, 2 * each)]


@pytest.mark.slow  # the store's calls have to time out
def test_a_stopped_node_of_rank_0_is_missed_in_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_two_nodes(monkeypatch, 1)
    began = time.monotonic()
    code, paths = hang(tmp_path, "pass\n    if env.rank == 0: time.sleep(3); os.kill(os.getpid(), 19)")
    assert code == ExitCode.HANG, paths.rank_log("a", 1).read_text()
    assert time.monotonic() - began < 55, "a save may take 60 seconds here"
    (event,) = read_lines(paths.events)
    assert [place["rank"] for place in event["behind"]] == [0]


@pytest.mark.slow  # it waits for seven seconds
def test_a_node_that_has_finished_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than the 3 seconds after which a silent node would be."""
    on_two_nodes(monkeypatch, 1)
    action = "pass\n    time.sleep(2)\n    dist.barrier()\n    time.sleep(7 if env.rank == 0 else 0)"
    monkeypatch.setitem(globals(), "HANGING", HANGING.rpartition("    dist.barrier()")[0])
    code, paths = hang(tmp_path, action)
    assert code == 0, paths.rank_log("a", 0).read_text()
    assert not paths.events.exists()


@pytest.mark.slow  # the store's calls have to time out
def test_a_stopped_rank_0_takes_the_store_with_it(tmp_path: Path) -> None:
    code, paths = hang(tmp_path, "pass\n    if env.rank == 0: os.kill(os.getpid(), 19)")
    assert code == ExitCode.HANG
    (event,) = read_lines(paths.events)
    assert [place["rank"] for place in event["behind"]] == [0]


def test_quit_writes_stacks_and_a_clean_end_leaves_no_file(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom launcher.contract.rundir import RunPaths\n"
        "from launcher.contract.spec import WatchdogSpec\nfrom sft.runtime.rank_env import RankEnv\n"
        "from sft.health.watchdog import Watchdog\n"
        "with Watchdog(WatchdogSpec(), RunPaths(Path(sys.argv[1])), RankEnv(attempt='a')):\n"
        "    print('ready', flush=True); sys.stdin.readline()\n"
    )
    for quits in (True, False):
        process = subprocess.Popen(
            [sys.executable, "-c", program, str(paths.root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=CHECKOUT,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        if quits:
            process.send_signal(signal.SIGQUIT)
            deadline = time.monotonic() + 20
            while not paths.stacks("a", 0).stat().st_size and time.monotonic() < deadline:
                time.sleep(0.05)
        process.communicate("\n", timeout=60)
        assert process.returncode == 0
        assert paths.stacks("a", 0).exists() is quits
        paths.stacks("a", 0).unlink(missing_ok=True)
