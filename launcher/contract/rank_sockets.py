"""Where the ranks of a run answer questions about themselves: sockets that only processes of the same machine reach.

A rank listens at an abstract Unix socket whose name begins with `prefix(run, attempt)`. The kernel lists these names,
removes them with their process, and tells each side which user and process the other one is. Anybody on the node can
connect to such a socket, or take a name first: both sides look at the other's user before they say or believe anything.

Rejected: sockets in a folder (each container has a /tmp of its own, and a killed rank leaves its file behind), and a
port (it answers whole networks).
"""

from __future__ import annotations

import hashlib
import os
import socket
import struct
from pathlib import Path
from typing import TypedDict

Frame = tuple[str, int, str]
"""File, line and function."""


class Thread(TypedDict):
    """A Python thread of a rank; its frames, the outermost first."""

    name: str
    frames: list[Frame]


_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


def prefix(run: Path, attempt: str) -> str:
    """Return how the names of all sockets of an attempt begin."""
    key = f"{os.path.realpath(run)}\0{attempt}".encode(errors="surrogateescape")
    return f"sft-{hashlib.sha256(key).hexdigest()[:24]}-"


def address(run: Path, attempt: str, rank: int) -> str:
    """Return the address of this process as rank `rank`."""
    # With the process id: a child that was forked with the socket open may outlive the rank and hold the name.
    return f"\0{prefix(run, attempt)}{rank}-{os.getpid()}"


def addresses(run: Path, attempt: str) -> list[tuple[int, str]]:
    """Return rank and address of every socket of an attempt on this machine, by rank."""
    begin = f"@{prefix(run, attempt)}"
    lines = Path("/proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    names = {line.split()[-1] for line in lines if begin in line}
    ours = [(name.removeprefix(begin).partition("-")[0], name) for name in names if name.startswith(begin)]
    return sorted((int(rank), f"\0{name[1:]}") for rank, name in ours if rank.isdecimal())


def peer(connection: socket.socket) -> tuple[int, int]:
    """Return process id and user id of the other side, with 0 for a process that this one cannot see."""
    size = _CREDENTIALS.size
    pid, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return pid, uid


def is_trusted(uid: int) -> bool:
    """Return whether a user may ask, or be believed: this one, and root."""
    return uid in (os.getuid(), 0)
