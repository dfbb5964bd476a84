"""Who may submit into a run directory: one command at a time, however many are started.

A lock on a file in the directory; the kernel lets go of it when its holder dies, however it dies. The file may be
removed with its directory while others wait for it, so whoever gets the lock looks whether it is still the file there.

Rejected: locking the directory itself (flock wants a file that is open for writing on NFS), and a file whose existence
is the lock (a killed launcher would leave it).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".launcher.lock"
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # file systems mounted without locks (Lustre can be)


@contextlib.contextmanager
def claim(root: Path, *, create: bool = False) -> Iterator[None]:
    """Hold the run directory `root`; whoever comes second waits, and then sees what the first one did.

    `create` makes the directory (0700) where it is missing. Raises OSError where it cannot be made or opened.
    """
    handle = _take(root, create)
    try:
        yield
    finally:
        os.close(handle)


def _take(root: Path, create: bool) -> int:
    path = root / LOCK_FILE
    while True:
        if create:
            with contextlib.suppress(FileExistsError):
                root.mkdir(mode=0o700)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:  # its directory was removed by whoever held it
            if create:
                continue
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
        if _is_open_at(handle, path):
            return handle
        os.close(handle)


def _is_open_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
