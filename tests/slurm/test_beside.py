"""`launcher stacks` and `launcher shell` inside the allocation of a run, whose ranks go on."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.contract.rundir import RunPaths
from tests.rank_stub import rank_stub
from tests.slurm.cluster import SlurmCluster
from tests.slurm.processes import wait_until
from tests.slurm.runs import CHECKOUT, Workbench, events, make_workbench

pytestmark = pytest.mark.slurm


@pytest.fixture
def bench(slurm: SlurmCluster, tmp_path: Path) -> Workbench:
    return make_workbench(tmp_path / "bench", slurm)


@pytest.fixture
def run(bench: Workbench) -> Iterator[RunPaths]:
    """Two ranks on each of two nodes, all of which wait."""
    folder = bench.root / "ranks"
    found = bench.submit("watched", rank_stub(folder), "checkpoint.export=false")
    wait_until(lambda: len(list(folder.glob("ready-*"))) == 4, "the ranks", timeout=120)
    yield found
    (folder / "go-on").touch()
    bench.wait_for_state(found, "COMPLETED")  # nothing that looked at the ranks has ended them


def test_stacks_and_shell(run: RunPaths, bench: Workbench) -> None:
    told = json.loads(bench.launcher("stacks", str(run.root), "--json").stdout)
    processes = [process for group in told["groups"] for process in group["processes"]]
    hosts = bench.cluster.nodes_of(bench.status(run)["job"])
    of_ranks = {process["rank"]: process["host"] for process in processes}
    assert of_ranks == {0: hosts[0], 1: hosts[0], 2: hosts[1], 3: hosts[1]}
    assert ([group["ranks"] for group in told["groups"]], told["silent"]) == ([[1], [0, 2, 3]], [])
    show = 'echo "$SLURMD_NODENAME $OMP_NUM_THREADS ${RANK-no} $1"'
    words = ["shell", str(run.root), "--rank=3", "--", "bash", "-c", show]
    assert bench.launcher(*words, "bash", "$(id)").stdout == f"{hosts[1]} 1 no $(id)\n"
    ended = bench.launcher("shell", str(run.root), "--", "bash", "-c", "exit 7", check=False)
    assert ended.returncode == 7
    _shell_with_a_terminal(run, bench, hosts[0])
    assert [event["event"] for event in events(run, "attempt_ended")] == []


def _shell_with_a_terminal(run: RunPaths, bench: Workbench, host: str) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "launcher", "shell", str(run.root)]
    env = {**bench.cluster.env, "SHELL": "/bin/bash", "PS1": "> "}
    process = subprocess.Popen(command, env=env, cwd=CHECKOUT, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.write(ours, b'tty; echo "at $SLURMD_NODENAME in $PWD"; exit 3\n')
    seen = b""
    try:
        while chunk := os.read(ours, 4096):
            seen += chunk
    except OSError:  # the other side is closed
        pass
    assert process.wait(60) == 3
    text = seen.decode()
    assert "beside rank 0 on " in text
    assert "/dev/pts/" in text
    assert f"at {host} in {run.root}" in text
