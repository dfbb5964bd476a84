"""The first half of the far end of `delivery`, on the login node: takes code and command from stdin.

This file is piped into a Python that may not have the launcher yet, so it uses the standard library only. It stores the
launcher's code, unless an earlier command has brought the same, and one command with all that it needs.
`launcher.arrived` then runs the command. Two steps, because a terminal may belong to the second: what is piped through
one is echoed, and the command can hold secrets.

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
"""Begins each answer: a login shell's start-up files may print lines of their own."""

_REQUEST = f"slurm-sft-launcher-{os.getuid()}-request-"
_UNUSED_SECONDS = 30 * 86400.0
_FORGOTTEN_SECONDS = 3600.0


def deposit() -> None:
    """Take code and command from stdin; the last answer says where they are."""
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
    json.loads(request)  # whole, or the other side is gone
    _clear(code.parent)
    handle, name = tempfile.mkstemp(prefix=_REQUEST)  # mode 0600, and not on a shared file system
    with os.fdopen(handle, "wb") as file:
        file.write(request)
    return _say(program=str(code / "code" / "launcher" / "arrived.py"), request=name)


def _say(**answer: str) -> None:
    print(f"{MARK}{json.dumps(answer)}", flush=True)


def _unpack(packed: bytes, size: int, code: Path) -> None:
    """All of it or nothing, whoever else is at it."""
    if len(packed) != size:
        sys.exit("the connection ended while the launcher's code was sent")
    code.parent.mkdir(exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=code.parent, prefix="."))
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(aside, filter="data")
    try:
        aside.rename(code)
    except OSError:  # another command has brought it meanwhile
        shutil.rmtree(aside)


def _clear(codes: Path) -> None:
    """Code that nothing has used for a month (runs have copies of theirs), and commands that were never carried out."""
    for code in codes.iterdir():
        if _age(code) > _UNUSED_SECONDS:
            shutil.rmtree(code, ignore_errors=True)
    for request in Path(tempfile.gettempdir()).glob(f"{_REQUEST}*"):
        if _age(request) > _FORGOTTEN_SECONDS:
            request.unlink(missing_ok=True)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except OSError:  # another command has cleared it away
        return 0.0


if __name__ == "__main__":
    deposit()
