"""The benchmarks that need no GPU and no data run: what they print is in docs/explanation/performance.md."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_can_be_imported(name: str) -> None:
    pytest.importorskip("torch", reason="benchmarks measure the training side")
    import_module(f"benchmarks.{name}")


def test_commands_are_timed() -> None:
    command = [sys.executable, "benchmarks/startup.py", "--repeats", "1", "--runs", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("status, 3 runs")


def test_an_epoch_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch", reason="benchmarks measure the training side")
    packing = import_module("benchmarks.packing")
    packing.measure_planning(2000)
    assert capsys.readouterr().out.startswith("2,000 examples: planned in ")
