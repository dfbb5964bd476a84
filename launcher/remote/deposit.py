"""Store the launcher's code and one command on a login node: the other end of `launcher.remote.delivery`.

This file is piped into a Python that may not have the launcher yet, so it uses the standard library only. It reads code
(unless an earlier command has brought the same) and command from stdin. `launcher.arrived` then runs the command. The
two are separate because the second may have a terminal: what is piped through a terminal is echoed, and a command can
hold secrets.

    DIRECTORY/.launcher/code/HASH/{code,home}   the launcher; the user's templates and cluster files
    DIRECTORY/.launcher/files/HASH/NAME         files that configs name; runs read them, so they stay
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
import time
from pathlib import Path

MARK = "slurm-sft-launcher: "
"""Starts each answer: a login shell's start-up files may print lines of their own."""

_REQUEST = f"slurm-sft-launcher-{os.getuid()}-request-"
_UNUSED_SECONDS = 30 * 86400.0
_LEFT_OVER_SECONDS = 3600.0


def deposit() -> None:
    """Read code and command from stdin, store them, and print where they are as the last answer."""
    stdin = sys.stdin.buffer
    head = json.loads(stdin.readline())
    directory = Path(head["directory"]).expanduser().absolute()
    if sys.version_info < (3, 11, 4):
        return _say(error=f"cluster.host_python: {sys.executable} is Python {sys.version.split()[0]}; 3.11.4 is needed")
    if not directory.is_dir():
        return _say(error=f"cluster.host_directory: {directory} is not a directory of {os.uname().nodename}")
    store = directory / ".launcher"
    store.mkdir(mode=0o700, exist_ok=True)
    code = store / "code" / head["code"]
    try:
        os.utime(code)
        _say(code="have")
    except FileNotFoundError:
        _say(code="need")
        size = int(stdin.readline())
        _unpack(stdin.read(size), size, code)
    request = stdin.read()
    json.loads(request)  # fails where the connection ended in the middle of it
    _clear(code.parent)
    handle, name = tempfile.mkstemp(prefix=_REQUEST)  # mode 0600, and not on a shared file system
    with os.fdopen(handle, "wb") as file:
        file.write(request)
    return _say(program=str(code / "code" / "launcher" / "arrived.py"), request=name)


def _say(**answer: str) -> None:
    print(f"{MARK}{json.dumps(answer)}", flush=True)


def _unpack(packed: bytes, size: int, code: Path) -> None:
    """Unpack the archive into the folder `code`, whole or not at all, beside other commands that may do the same."""
    if len(packed) != size:
        sys.exit("the connection ended while the launcher's code was sent")
    code.parent.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=code.parent, prefix="."))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(aside, filter="data")
    try:
        aside.rename(code)
    except OSError:  # another command was first
        shutil.rmtree(aside)


def _clear(codes: Path) -> None:
    """Delete code that no command has used for a month (runs have copies of theirs), and commands that never ran."""
    for code in codes.iterdir():
        if _age(code) > _UNUSED_SECONDS:
            shutil.rmtree(code, ignore_errors=True)
    for request in Path(tempfile.gettempdir()).glob(f"{_REQUEST}*"):
        if _age(request) > _LEFT_OVER_SECONDS:
            request.unlink(missing_ok=True)


def _age(path: Path) -> float:
    """Return the seconds since a file was used last, 0 where it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # another command has deleted it
        return 0.0


if __name__ == "__main__":
    deposit()
