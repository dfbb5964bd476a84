"""Lets one command at a time submit into a run directory.

The lock is on a file in the directory, and the kernel releases it when its holder dies. The file may be removed with
its directory while others wait for it, so a process that gets the lock checks that its file is still the one there.

Rejected: locking the directory itself (on NFS, flock needs a file that is open for writing), and a file whose existence
is the lock (a killed launcher would leave it behind).
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
    """Hold the run directory `root`. A second process waits, and then sees what the first one did.

    With `create` a missing directory is made (0700). Raise OSError where it cannot be made or opened.
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
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError:  # whoever held the claim has removed the directory
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
