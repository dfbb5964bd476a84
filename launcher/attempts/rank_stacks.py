"""Ask the ranks of this node where they stand. Nothing here ends or interrupts a rank that can answer."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from launcher.contract import processes, rank_sockets
from launcher.contract.rank_sockets import Frame, Thread
from launcher.contract.rundir import RunPaths

_NODE = "SLURMD_NODENAME"
_FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)')
"""A frame as faulthandler writes it."""
_THREAD = re.compile(r"(?m)^(?:Current thread|Thread) .*$")
_LOOK_SECONDS = 0.3
_WRITE_SECONDS = 5.0
"""How long faulthandler may take to write the stacks of a rank that does not answer."""


class _Answer(TypedDict, total=False):
    """What sft.health.stack_answers sends."""

    phase: str
    step: int
    seconds: float
    threads: list[Thread]


def lines_of_node(run: Path, attempt: str, patience: float) -> Iterator[dict[str, object]]:
    """Yield a line about each rank of this node and one for each of its frames, each of a few hundred bytes.

    `patience` is how many seconds a rank may take to answer. All are asked at the same time.
    """
    found = rank_sockets.addresses(run, attempt)

    def ask(entry: tuple[int, str]) -> list[dict[str, object]]:
        return list(_lines_of_rank(RunPaths(run), attempt, *entry, patience))

    with ThreadPoolExecutor(max_workers=max(1, len(found))) as pool:
        for lines in pool.map(ask, found):
            yield from lines


def process_of(run: Path, attempt: str, rank: int, patience: float) -> int | None:
    """Return the process of a rank of this node, or None where it has none here."""
    for number, address in rank_sockets.addresses(run, attempt):
        with socket.socket(socket.AF_UNIX) as connection, contextlib.suppress(OSError):
            connection.settimeout(patience)
            if number == rank:
                connection.connect(address)
                pid = _process_behind(connection)
                if pid is not None:
                    return pid
    return None


def host() -> str:
    """Return this node's name, as Slurm says it where there is one."""
    return os.environ.get(_NODE) or socket.gethostname()


def _lines_of_rank(
    paths: RunPaths, attempt: str, rank: int, address: str, patience: float
) -> Iterator[dict[str, object]]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(patience)
        try:
            connection.connect(address)
            pid = _process_behind(connection)
        except OSError:
            return
        if pid is None:
            return
        answer = _answer(connection)
    about = {"rank": rank, "host": host(), "pid": pid, "process": processes.state(pid)}
    if answer is not None:
        threads = answer.get("threads", [])
        place = {key: answer.get(key) for key in ("phase", "step", "seconds")}
        yield {**about, "answered": True, **place}
    else:
        threads = _threads_by_signal(pid, paths.stacks(attempt, rank))
        yield {**about, "answered": False}
    for thread in threads:
        for file, line, function in thread["frames"]:
            yield {"rank": rank, "thread": thread["name"], "file": file, "line": line, "function": function}


def _process_behind(connection: socket.socket) -> int | None:
    """Return the process at the other end, or None where it is not this user's, or gone, or of another node."""
    pid, uid = rank_sockets.peer(connection)
    environment = processes.environment(pid) if pid and rank_sockets.is_trusted(uid) else {}
    own = os.environ.get(_NODE, "")  # virtual nodes share a machine, and so its sockets
    return pid if environment and (not own or environment.get(_NODE) == own) else None


def _answer(connection: socket.socket) -> _Answer | None:
    """Return what the rank says, or None where it says nothing in time."""
    text = b""
    with contextlib.suppress(OSError, ValueError):
        while chunk := connection.recv(1 << 16):
            text += chunk
        answer: _Answer = json.loads(text)
        return answer
    return None


def _threads_by_signal(pid: int, file: Path) -> list[Thread]:
    """Return the threads of a rank that does not answer, as faulthandler's C handler writes them into `file`.

    Such a rank is held up in C code that keeps the GIL, so that no Python code of it runs and no frame changes.
    """
    if not processes.catches(pid, signal.SIGQUIT) or processes.state(pid).startswith("T"):
        return []
    begin = _size(file)
    os.kill(pid, signal.SIGQUIT)
    size, deadline = begin, time.monotonic() + _WRITE_SECONDS
    while time.monotonic() < deadline:
        time.sleep(_LOOK_SECONDS)
        before, size = size, _size(file)
        if size == before > begin:
            break
    text = file.read_bytes()[begin:].decode(errors="replace") if size else ""
    return parse_faulthandler(text)


def parse_faulthandler(text: str) -> list[Thread]:
    """Return the threads in faulthandler's output. The main thread, which it writes last, comes first."""
    threads: list[Thread] = []
    for number, block in enumerate(reversed(_THREAD.split(text)[1:])):
        frames: list[Frame] = [
            (found["file"], int(found["line"]), found["function"]) for found in _FRAME.finditer(block)
        ]
        name = "MainThread" if number == 0 else f"thread {number}"
        threads.append({"name": name, "frames": frames[::-1]})
    return threads


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:
        return 0
