"""`status --watch`: the table of runs, shown anew whenever it changes."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from launcher.contract.job_state import JobState
from launcher.runs.state import RunStatus
from launcher.views.status_table import status_table

_SECONDS = 5.0
COLOURS = {
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

Pick = Callable[[], tuple[list[RunStatus], str | None]]
"""Returns the runs' rows and, if the scheduler could not be asked, why."""
Show = Callable[[Sequence[RunStatus], str | None], None]


def watch(pick: Pick, interval: float = _SECONDS) -> None:
    """Show what `pick` returns, every `interval` seconds, until all runs have ended."""
    with _screen() as show:
        while True:
            rows, problem = pick()
            show(rows, problem)
            if rows and problem is None and all(row.state.terminal for row in rows):
                return
            time.sleep(interval)


@contextlib.contextmanager
def _screen() -> Iterator[Show]:
    """Yield a function that shows rows: in place on a terminal, one table after another elsewhere."""
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
            for state, colour in COLOURS.items():
                text.highlight_regex(rf"(?m)^\S+\s+{state.value}\b", colour)
            live.update(text, refresh=True)

        yield redraw


def _text(rows: Sequence[RunStatus], problem: str | None, width: int | None) -> str:
    body = status_table(rows, width) if rows else "no runs"
    return body if problem is None else f"{body}\nerror: {problem}"
