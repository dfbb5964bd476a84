"""Read weight files into the node's memory once, by all of its ranks together, before each takes its parts.

Ranks of a node need the same bytes: data parallel ones all of them, tensor parallel ones other columns of the same
rows. The kernel's page cache is memory that they share, so a byte that one of them has read is there for all. Left to
themselves they would all wait for the same bytes at the same time, page by page. Here each reads its share in large
pieces, so that as many streams come from the file system as there are ranks. What is in the cache already is left.

Rejected: one rank that reads and sends (gloo moves a byte more slowly than memory does, and each byte goes over it once
for each rank), and shared memory of our own (/dev/shm is 64 MB in many containers, and the model would be in memory
twice).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

PIECE = 4 << 20
"""Bytes that are read at once."""
_PROBE = 4096

Range = tuple[Path, int, int]
"""A file, the first byte, and the one after the last."""


def joined(ranges: Iterable[Range]) -> list[Range]:
    """Return sorted ranges that cover the same bytes, each byte once."""
    found: list[Range] = []
    for path, begin, end in sorted(ranges):
        if found and found[-1][0] == path and begin <= found[-1][2]:
            found[-1] = (path, found[-1][1], max(end, found[-1][2]))
        else:
            found.append((path, begin, end))
    return found


def pieces(ranges: Sequence[Range], share: int, shares: int) -> list[Range]:
    """Return one of so many equal shares of `ranges`, as neighbouring pieces of PIECE bytes at most."""
    cut = [(path, at, min(at + PIECE, end)) for path, begin, end in ranges for at in range(begin, end, PIECE)]
    return cut[len(cut) * share // shares : len(cut) * (share + 1) // shares]


def read_ahead(ranges: Iterable[Range], share: int, shares: int) -> int:
    """Read this share of the bytes into the page cache, as far as they are not there, and return how many were read.

    Errors are left to whoever needs the bytes, and can say which tensor they belong to.
    """
    buffer = bytearray(PIECE)
    total = 0
    opened: dict[Path, int] = {}
    try:
        for path, begin, end in pieces(joined(ranges), share, shares):
            if path not in opened:
                opened[path] = os.open(path, os.O_RDONLY)
            # By its end: the kernel reads ahead of the rank that has the piece before, into the beginning of this one.
            if not _is_cached(opened[path], max(begin, end - _PROBE)):
                total += os.preadv(opened[path], [memoryview(buffer)[: end - begin]], begin)
    except OSError:
        return total
    finally:
        for handle in opened.values():
            os.close(handle)
    return total


def available_memory() -> int:
    """Return how many bytes of this node's memory could be used without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return 0


def _is_cached(handle: int, at: int) -> bool:
    """Return whether the bytes there can be read without waiting for the disk."""
    try:
        return os.preadv(handle, [bytearray(_PROBE)], at, os.RWF_NOWAIT) > 0
    except OSError as error:
        if error.errno in (
            errno.EAGAIN,
            errno.EOPNOTSUPP,
            errno.EINVAL,
        ):  # not there, or a file system without an answer
            return False
        raise
