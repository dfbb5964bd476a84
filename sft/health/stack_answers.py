"""Tell who asks (`launcher stacks`) where the threads of this rank are, without disturbing them.

A thread waits at a socket (launcher.contract.rank_sockets). It reads the frames of the others while it holds the GIL,
so that none of them changes meanwhile, and no system call of theirs is interrupted.

Rejected: a signal. It interrupts system calls of libraries that do not expect it, its C handler reads frames that other
threads are changing, and it ends a process that has no handler yet, or no longer.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from launcher.contract import rank_sockets
from sft.runtime.rank_env import RankEnv

_NAME = "stacks"
_SEND_SECONDS = 10.0
"""How long one who asks may take to read the answer."""


@contextlib.contextmanager
def answering(run: Path, env: RankEnv, position: Callable[[], Mapping[str, object]]) -> Iterator[None]:
    """Answer while the body runs. `position` says in which phase of which step the rank is."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(rank_sockets.address(run, env.attempt, env.rank))
        listener.listen()
    except OSError as error:  # a sandbox without Unix sockets: the run is worth more than its stacks
        listener.close()
        print(f"`launcher stacks` will not see rank {env.rank}: {error}", flush=True)
        yield
        return
    threading.Thread(target=_serve, args=(listener, env.rank, position), name=_NAME, daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)  # ends the wait in accept, which close would not
        listener.close()


def _serve(listener: socket.socket, rank: int, position: Callable[[], Mapping[str, object]]) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(OSError):  # whoever asked may be gone
            if not rank_sockets.is_trusted(rank_sockets.peer(connection)[1]):
                continue
            connection.settimeout(_SEND_SECONDS)
            answer = {"rank": rank, "pid": os.getpid(), **position(), "threads": _threads()}
            connection.sendall(json.dumps(answer, ensure_ascii=False).encode(errors="replace"))


def _threads() -> list[dict[str, object]]:
    """Return name and frames of each Python thread but this one, the main thread first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    main, own = threading.main_thread().ident, threading.get_ident()
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident != own}
    order = sorted(frames, key=lambda ident: (ident != main, ident))
    return [{"name": names.get(ident, "unknown"), "frames": _frames(frames[ident])} for ident in order]


def _frames(frame: FrameType | None) -> list[tuple[str, int, str]]:
    """Return file, line and function of a frame and its callers, the outermost first."""
    found = []
    while frame is not None:
        code = frame.f_code
        found.append((code.co_filename, frame.f_lineno or 0, code.co_name))
        frame = frame.f_back
    return found[::-1]
