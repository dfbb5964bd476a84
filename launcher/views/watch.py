"""Look at runs again and again: `status --watch` for people, `wait` for scripts.

Both ask the scheduler as seldom as `status` does (`launcher.scheduler.queries`), whatever the runs and shells.
"""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from launcher.contract.errors import SchedulerError
from launcher.contract.job_state import JobState
from launcher.contract.rundir import RunPaths
from launcher.runs.state import RunStatus, collect
from launcher.views.table import table

_SECONDS = 5.0
_PATIENCE = 12
"""Times in a row that a state may be unknown before `wait` gives up."""

_COLOURS = {
    JobState.RUNNING: "green",
    JobState.COMPLETED: "bold green",
    JobState.FAILED: "bold red",
    JobState.OUT_OF_MEMORY: "bold red",
    JobState.TIMEOUT: "yellow",
    JobState.NODE_FAIL: "yellow",
    JobState.PREEMPTED: "yellow",
    JobState.INTERRUPTED: "yellow",
    JobState.HELD: "magenta",
    JobState.UNKNOWN: "dim",
}


def wait(runs: Sequence[RunPaths], timeout: float | None = None, interval: float = _SECONDS) -> list[RunStatus] | None:
    """Rows of all runs once none can go on by itself; None when `timeout` seconds were not enough.

    SchedulerError where nobody can tell how they are: whoever waits for a word would wait for ever.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    silent = 0
    while True:
        rows, problem = collect(runs)
        going_on = [row for row in rows if not row.state.terminal]
        if not going_on:
            return rows
        silent = silent + 1 if all(row.state is JobState.UNKNOWN for row in going_on) else 0
        if silent >= _PATIENCE:
            raise SchedulerError(problem or "\n".join(f"run {row.run} is UNKNOWN: {row.reason}" for row in going_on))
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        time.sleep(interval if left is None else min(interval, left))


def watch(pick: Callable[[], tuple[list[RunStatus], str | None]], interval: float = _SECONDS) -> None:
    """Show the rows that `pick` gives until all runs have ended, or Ctrl-C."""
    with _screen() as show:
        while True:
            rows, problem = pick()
            show(rows, problem)
            if rows and problem is None and all(row.state.terminal for row in rows):
                return
            time.sleep(interval)


Show = Callable[[Sequence[RunStatus], str | None], None]


@contextlib.contextmanager
def _screen() -> Iterator[Show]:
    """Something that shows rows: in place on a terminal, one table after another elsewhere."""
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        last = ""

        def print_changes(rows: Sequence[RunStatus], problem: str | None) -> None:
            nonlocal last
            text = _text(rows, problem, None)
            if text != last:
                print(f"{time.strftime('%H:%M:%S')}\n{text}", flush=True)
                last = text

        yield print_changes
        return
    from rich.live import Live
    from rich.text import Text

    with Live(auto_refresh=False, vertical_overflow="crop") as live:

        def redraw(rows: Sequence[RunStatus], problem: str | None) -> None:
            text = Text(_text(rows, problem, shutil.get_terminal_size().columns), no_wrap=True)
            for state, colour in _COLOURS.items():
                text.highlight_regex(rf"(?m)^\S+\s+{state.value}\b", colour)
            live.update(text, refresh=True)

        yield redraw


def _text(rows: Sequence[RunStatus], problem: str | None, width: int | None) -> str:
    body = table(rows, width) if rows else "no runs"
    return body if problem is None else f"{body}\nerror: {problem}"
