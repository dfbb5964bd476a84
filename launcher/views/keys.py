"""Single keys from a terminal, without waiting for Enter."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import tty
from collections.abc import Callable, Iterator

_NAMES = {b"\x1b[A": "up", b"\x1bOA": "up", b"\x1b[B": "down", b"\x1bOB": "down", b"\r": "enter", b"\n": "enter"}
_NAMES |= {b"\x1b[5~": "page up", b"\x1b[6~": "page down", b"\x1b[H": "home", b"\x1b[F": "end", b"\x1b": "escape"}

Read = Callable[[float], str]
"""Waits so many seconds for a key and returns its name, or an empty text where none came."""


@contextlib.contextmanager
def single_keys() -> Iterator[Read]:
    """Yield a function that reads keys. The terminal is as before behind the block. Ctrl-C stays an interrupt."""
    handle = sys.stdin.fileno()
    before = termios.tcgetattr(handle)

    def read(seconds: float) -> str:
        if not select.select([handle], [], [], seconds)[0]:
            return ""
        typed = os.read(handle, 64)
        if not typed:
            return "q"  # the terminal is gone
        return _NAMES.get(typed, typed.decode(errors="replace")[:1])

    tty.setcbreak(handle)
    try:
        yield read
    finally:
        termios.tcsetattr(handle, termios.TCSADRAIN, before)
