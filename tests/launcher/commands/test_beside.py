"""`launcher stacks` and `launcher shell` on a run of this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.exit_codes import ExitCode
from launcher.contract.rundir import RunPaths
from launcher.runs.wait import wait
from tests.rank_stub import rank_stub
from tests.schemas import problems
from tests.slurm.processes import wait_until

CHECKOUT = Path(__file__).parents[3]


@pytest.fixture
def ranks(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The run `first`, whose two ranks wait; the folder in which they say so."""
    folder = workdir.parent / "ranks"
    monkeypatch.setenv("PYTHONPATH", str(CHECKOUT))
    assert main(["submit", "cfg.yaml", rank_stub(folder), "checkpoint.export=false"]) == 0
    try:
        wait_until(lambda: len(list(folder.glob("ready-*"))) == 2, "both ranks", timeout=60)
        yield folder
    finally:
        (folder / "go-on").touch()
        wait([RunPaths(workdir / "runs" / "first")], interval=0.05)


def test_stacks_and_shell(ranks: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert main(["stacks", "first"]) == 0
    head, first, second = capfd.readouterr().out.split("\n\n")
    assert head == "run first, attempt local-1: 2 ranks on 1 node"
    assert first.startswith("rank 0 (")
    assert "): loading after step 0, for " in first
    assert second.splitlines()[-2].endswith(" behind")
    assert main(["stacks", "first", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert problems("stacks", told) == []
    assert [(group["ranks"], group["answered"], group["phase"]) for group in told["groups"]] == [
        ([0], True, "loading"),
        ([1], True, "loading"),
    ]
    assert [frame["function"] for frame in told["groups"][1]["threads"][0]["frames"]] == ["<module>", "behind", "waits"]
    _shell(capfd)
    assert main(["shell", "first", "--rank", "2"]) == ExitCode.CONFLICT
    assert "has ranks 0 to 1, and no rank 2" in capfd.readouterr().err


def _shell(capfd: pytest.CaptureFixture[str]) -> None:
    """Its words are a program's own, whatever is in them, and no shell reads them."""
    show = "import os, sys; print(sys.argv[1:], os.environ.get('RANK'), os.environ['OMP_NUM_THREADS'])"
    words = ["shell", "--rank", "1", "first", "--", sys.executable, "-c", show, "--json", "$(id) ;", "--"]
    command = [sys.executable, "-m", "launcher", *words]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}, capture_output=True, text=True)
    assert done.stdout == "['--json', '$(id) ;', '--'] None 1\n", done.stderr


def test_a_run_that_does_not_run(workdir: Path, fake_python: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "cfg.yaml", fake_python, "checkpoint.export=false"]) == 0
    wait([RunPaths(workdir / "runs" / "first")], interval=0.05)
    capsys.readouterr()
    for command in ("stacks", "shell"):
        assert main([command, "first"]) == ExitCode.CONFLICT
        assert capsys.readouterr().err == "error: run first is COMPLETED: no rank runs\n"
