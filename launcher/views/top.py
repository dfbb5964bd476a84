"""`launcher top`: one screen for all runs, looked at again and again, with keys that act on the chosen one.

Actions are the launcher's own commands, started as a person would type them: they refuse and report as always.

Rejected: textual, which brings a framework and its dependencies for what rich's `Live` and a few keys do.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from rich.console import Console
from rich.live import Live

from launcher.runs.state import RunStatus
from launcher.views.keys import Read, single_keys
from launcher.views.top_lines import Looks, TopLine
from launcher.views.top_screen import View, screen

_LOOK_SECONDS = 5.0
_KEY_SECONDS = 0.25
_MESSAGE_SECONDS = 6.0
_PLAIN_SIZE = (80, 24)

Pick = Callable[[], tuple[Sequence[RunStatus], str | None]]
"""Returns the runs' rows and, if the scheduler could not be asked, why."""


def print_once(pick: Pick) -> None:
    """Print the screen once, without colours, for output that is no terminal."""
    rows, problem = pick()
    width, height = shutil.get_terminal_size(_PLAIN_SIZE)
    console = Console(width=width, no_color=True, highlight=False)
    console.print(screen(Looks().lines(rows), View(problem=problem), width, max(height, len(rows) + 12)), no_wrap=True)


def watch_all(pick: Pick) -> None:
    """Show the runs until the user quits."""
    top = _Top(pick)
    with single_keys() as read:
        while top.goes_on:
            with Live(screen=True, auto_refresh=False) as live:
                top.show(live, read)
            top.leave()


@dataclass(slots=True)
class _Top:
    pick: Pick
    goes_on: bool = True
    view: View = field(default_factory=lambda: View(message="looking at the runs ..."))
    lines: list[TopLine] = field(default_factory=list)
    looks: Looks = field(default_factory=Looks)
    asked: str = ""
    """The command that waits for a yes."""
    running: subprocess.Popen[str] | None = None
    outside: list[str] | None = None
    """A command that has the terminal to itself."""
    look: Future[tuple[Sequence[RunStatus], str | None]] | None = None
    """A look at the runs that is under way: a scheduler may take its time, and keys must not wait for it."""
    due: float = 0.0
    message_until: float = math.inf
    """The first message stays until the first look has ended."""

    @property
    def chosen(self) -> TopLine | None:
        return self.lines[min(self.view.chosen, len(self.lines) - 1)] if self.lines else None

    def show(self, live: Live, read: Read) -> None:
        """Draw and read keys, until the terminal is needed for something else."""
        drawn = None
        while self.goes_on and self.outside is None:
            self._look()
            self._attend()
            size = shutil.get_terminal_size()
            now = (self.view, tuple(self.lines), size, int(time.time()))
            if now != drawn:
                live.update(screen(self.lines, self.view, size.columns, size.lines), refresh=True)
                drawn = now
            self._press(read(_KEY_SECONDS))

    def leave(self) -> None:
        """Run a command that has the terminal to itself, if one was asked for."""
        if self.outside is None:
            return
        words, self.outside = self.outside, None
        try:
            subprocess.call(words)
            print("\n[Enter] goes back to the runs", end="", flush=True)
            sys.stdin.readline()
        except KeyboardInterrupt:  # ends the showing of logs
            pass
        self.due = 0.0

    def _look(self) -> None:
        """Begin a look at the runs when it is time, and show what it has found when it has ended."""
        if self.look is None and time.monotonic() >= self.due:
            self.look = _in_background(self.pick)
        if self.look is None or not self.look.done():
            return
        rows, problem = self.look.result()
        self.look, self.due = None, time.monotonic() + _LOOK_SECONDS
        if self.message_until == math.inf:
            self.message_until = 0.0
        chosen = self.chosen
        self.lines = self.looks.lines(rows)
        names = [line.row.directory for line in self.lines]
        place = names.index(chosen.row.directory) if chosen and chosen.row.directory in names else self.view.chosen
        self.view = dataclasses.replace(self.view, chosen=place, problem=problem)

    def _attend(self) -> None:
        """Tell what a command said once it has ended, and forget old messages."""
        if self.running is not None and self.running.poll() is not None:
            said, _ = self.running.communicate()
            self._say((said.strip().splitlines() or ["done"])[-1])
            self.running, self.due = None, 0.0
        is_old = time.monotonic() > self.message_until
        if self.view.message and not self.asked and self.running is None and is_old:
            self.view = dataclasses.replace(self.view, message="")

    def _say(self, text: str) -> None:
        self.view = dataclasses.replace(self.view, message=text)
        self.message_until = time.monotonic() + _MESSAGE_SECONDS

    def _press(self, key: str) -> None:
        line = self.chosen
        if self.asked:
            self._answer(key)
        elif key in ("q", "escape"):
            self.goes_on = False
        elif key in ("up", "k", "down", "j", "page up", "page down", "home", "end"):
            self._move(key)
        elif line is None or not key:
            return
        elif key in ("f", "enter"):
            self.outside = _command("logs", "-f", line.row.directory)
        elif key == "w":
            self.outside = _command("status", "--why", line.row.directory)
        elif key in ("c", "r") and self.running is None:
            self.asked = "cancel" if key == "c" else "resubmit"
            self._say(f"{self.asked} {line.row.run} ({line.row.state.value})? y: yes, any other key: no")

    def _answer(self, key: str) -> None:
        line, what = self.chosen, self.asked
        if not key:
            return
        self.asked = ""
        if key != "y" or line is None:
            self._say(f"nothing was done to {line.row.run}" if line else "")
            return
        self._say(f"{what} {line.row.run} ...")
        words = _command(what, line.row.directory)
        self.running = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def _move(self, key: str) -> None:
        by = {"up": -1, "k": -1, "down": 1, "j": 1, "page up": -10, "page down": 10}.get(key, 0)
        last = max(0, len(self.lines) - 1)
        place = {"home": 0, "end": last}.get(key, self.view.chosen + by)
        self.view = dataclasses.replace(self.view, chosen=max(0, min(last, place)))


def _in_background(pick: Pick) -> Future[tuple[Sequence[RunStatus], str | None]]:
    """Return what `pick` will have returned. The thread is a daemon, or it would hold up the end of the program."""
    answer: Future[tuple[Sequence[RunStatus], str | None]] = Future()

    def ask() -> None:
        try:
            answer.set_result(pick())
        except BaseException as error:  # for the thread that asks for the result
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    return answer


def _command(*words: str) -> list[str]:
    return [sys.executable, "-m", "launcher", *words]
