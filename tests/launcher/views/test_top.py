"""`launcher top`: its curves, its screen in terminals of any size, and its keys in a real terminal."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.__main__ import main
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths, append_event, append_line, write_atomic
from launcher.contract.spec import ResourcesSpec, RunSpec, sealed
from launcher.runs.state import RunStatus
from launcher.views.sparkline import GrowingCurves, sparkline
from launcher.views.top_lines import Looks, TopLine
from tests.launcher.conftest import Commands
from tests.launcher.fake_slurm import FakeSlurm
from tests.launcher.runs.test_state import make_run

pytest.importorskip("rich")
from launcher.views.top_screen import View, screen

CHECKOUT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("values", "width", "curve"),
    [
        ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"),
        ([7, 0], 8, "█▁"),
        ([0, 0, 7, 7], 2, "▁█"),
        ([3, 3, 3], 8, "▁▁▁"),
        ([1, math.nan, 2], 8, "▁·█"),
        ([math.inf], 8, "·"),
        ([], 8, ""),
        ([1, 2], 0, ""),
    ],
)
def test_sparkline(values: list[float], width: int, curve: str) -> None:
    assert sparkline(values, width) == curve


def test_curves_read_what_is_new(tmp_path: Path) -> None:
    """A line that is half written, a line that is damaged, and a file that an attempt has replaced."""
    file = tmp_path / "metrics.jsonl"
    curves = GrowingCurves(file)
    curves.look()
    append_line(file, {"step": 1, "loss": 3.0})
    with file.open("a") as stream:
        stream.write('{"step": 2, "lo')
    curves.look()
    assert curves.numbers["loss"] == [3.0]
    with file.open("a") as stream:
        stream.write('ss": 2.0}\nnonsense\n')
    curves.look()
    assert curves.numbers["loss"] == [3.0, 2.0]
    write_atomic(file, '{"step": 1, "loss": 5.0}\n')
    curves.look()
    assert curves.numbers == {"step": [1.0], "loss": [5.0]}


def line(name: str, state: JobState, **fields: object) -> TopLine:
    row = RunStatus(run=name, directory=f"/r/{name}", state=state, job="7", scheduler="slurm", step=5, max_steps=9)
    return TopLine(row=row, gpus=8, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 12), (20, 10), (200, 8)])
@pytest.mark.parametrize("chosen", [0, 29])
def test_screen_fits(size: tuple[int, int], chosen: int) -> None:
    width, height = size
    faults = ("a fault " * 30, "another\nof two lines")
    lines = [
        line(f"run-{number}-{'x' * number}", JobState.RUNNING, losses=range(99), faults=faults) for number in range(30)
    ]
    rows = screen(lines, View(chosen=chosen, problem="no answer " * 20), width, height).plain.split("\n")
    assert len(rows) <= height
    assert max(map(len, rows)) <= width
    assert [row[:8] for row in rows if row.startswith("▸")] == [f"▸ run-{chosen}-"[:8]]
    if width == 80 and chosen == 0:
        assert rows[0].startswith(" 240 GPUs in use, 30 running")
        assert rows[1].split() == ["RUN", "STATE", "STEP", "LOSS", "CURVE", "GPUS", "FAULTS"]
        assert rows[2].split()[2:] == ["RUNNING", "5/9", "-", "▁▁▂▃▃▄▅▆▆▇██", "8", "2"]
        assert "no answer" in rows[-2]


@pytest.mark.handmade_records
def test_what_is_known_of_runs(tmp_path: Path) -> None:
    """Those at work first, then those that wait, then those that have ended, the newest first."""
    rows = []
    for name, state in (("old", "COMPLETED"), ("new", "FAILED"), ("waits", "PENDING"), ("works", "RUNNING")):
        paths = RunPaths(tmp_path / name)
        paths.root.mkdir()
        rows.append(RunStatus(run=name, directory=str(paths.root), state=JobState(state)))
    works = RunPaths(tmp_path / "works")
    works.config.write_text(sealed(RunSpec(name="works", resources=ResourcesSpec(nodes=2, gpus_per_node=4))))
    append_event(works, "restart_decided", cause="hang", detail="rank 3", decision="requeue")
    append_event(works, "bad_step", step=7, reason="NaN")
    append_event(works, "restart_decided", cause="done", detail="", decision="stop")
    looks = Looks()
    looks.lines(rows)
    append_line(works.metrics, {"step": 1, "loss": 3.0})
    lines = looks.lines(rows)
    assert [one.row.run for one in lines] == ["works", "waits", "new", "old"]
    assert (lines[0].gpus_now, lines[1].gpus_now, list(lines[0].losses)) == (8, 0, [3.0])
    assert lines[0].faults == ("hang: rank 3 → requeue", "step 7 was not applied: NaN")
    assert lines[0].restarts == 1


def test_one_screen_where_there_is_no_terminal(
    tmp_path: Path, commands: Commands, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeSlurm(commands).submit("a")
    make_run(tmp_path, "a", job_id="1")
    assert main(["top", "--run-root", str(tmp_path)]) == 0
    assert "a" in capsys.readouterr().out.splitlines()[2].split()


def test_keys_do_not_wait_for_the_scheduler(tmp_path: Path, commands: Commands) -> None:
    commands.add("squeue", "sleep 600")
    make_run(tmp_path / "runs", "one", job_id="1")
    shown = Terminal(tmp_path / "runs")
    try:
        shown.wait_for("looking at the runs")
        shown.press("q")
        assert shown.process.wait(5) == 0
    finally:
        shown.process.kill()
        shown.process.wait()
        os.close(shown.ours)


def test_refusal_without_rich(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["top"]) == 2
    assert "top needs the package rich: pip install rich" in capsys.readouterr().err


class Terminal:
    """`launcher top` in a terminal of 80 x 24, as a person sees it."""

    def __init__(self, root: Path) -> None:
        self.ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
        command = [sys.executable, "-m", "launcher", "top", "--run-root", str(root)]
        environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
        )
        os.close(theirs)
        self.seen = ""

    def wait_for(self, text: str, seconds: float = 30.0) -> None:
        """Wait until the program has written `text` since the last such wait."""
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < deadline, f"{text!r} is not in {self.seen[-3000:]!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.ours, 65536).decode(errors="replace")
        self.seen = self.seen.partition(text)[2]

    def press(self, keys: str) -> None:
        os.write(self.ours, keys.encode())


@pytest.fixture
def terminal(tmp_path: Path, commands: Commands) -> Iterator[Terminal]:
    slurm = FakeSlurm(commands)
    slurm.submit("one", "two")
    commands.add("scancel", "")
    slurm.start("1")
    for number, name in enumerate(("one", "two"), 1):
        paths = make_run(tmp_path / "runs", name, job_id=str(number))
        paths.config.write_text(sealed(RunSpec(name=name, run_root=str(tmp_path / "runs"))))
        append_event(paths, "submitted", job_id=str(number), scheduler="slurm")
    shown = Terminal(tmp_path / "runs")
    yield shown
    shown.process.kill()
    shown.process.wait()
    os.close(shown.ours)


def test_keys(terminal: Terminal, tmp_path: Path, commands: Commands) -> None:
    terminal.wait_for("▸ one")
    terminal.press("\x1b[B")
    terminal.wait_for("▸ two")
    terminal.press("c")
    terminal.wait_for("cancel two (PENDING)? y: yes, any other key: no")
    terminal.press("n")
    terminal.wait_for("nothing was done to two")
    assert commands.calls("scancel") == []
    terminal.press("w")
    terminal.wait_for("submitted as slurm job 2")
    terminal.wait_for("[Enter] goes back to the runs")
    terminal.press("\n")
    terminal.wait_for("▸ two")
    terminal.press("c")
    terminal.wait_for("any other key: no")
    terminal.press("y")
    terminal.wait_for("cancelled run two (job 2)")
    assert commands.calls("scancel") == ["2"]
    events = [json.loads(text) for text in (tmp_path / "runs" / "two" / "events.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "cancelled"
    terminal.press("r")
    terminal.wait_for("resubmit two (")
    terminal.press("y")
    terminal.wait_for("two is PENDING as job 2")  # it refuses as the command does
    terminal.press("f")
    terminal.wait_for("run two: job 2 is PENDING")
    terminal.press("\x03")  # ends the showing of logs
    terminal.wait_for("▸ two")
    terminal.press("q")
    assert terminal.process.wait(20) == 0
