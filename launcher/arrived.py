"""Run a command that was typed on another machine, with the launcher's code that was sent along.

`launcher.remote.delivery` sends both, `launcher.remote.deposit` stores them, and this program runs the command.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path


def run(path: Path) -> int:
    """Run the command in the file `path`, which is deleted, and return its exit code."""
    request = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    code = Path(__file__).absolute().parents[1]
    sys.path[0] = str(code)  # instead of this file's folder
    os.chdir(Path(request["directory"]).expanduser())
    os.environ.update(request["environment"])
    os.environ["SFT_LAUNCHER_HOME"] = str(code.parent / "home")
    if not sys.stdin.isatty():
        _end_with_stdin()

    from launcher.__main__ import main
    from launcher.contract import arrival

    store = code.parents[2] / "files"
    files = {item["written"]: str(_put(store, item["name"], item["content"])) for item in request["files"]}
    arrival.arrive(
        arrival.Arrival(cluster=request["cluster"], files=files, source=request["source"], diff=request["diff"])
    )
    return main(request["words"])


def _put(store: Path, name: str, encoded: str) -> Path:
    """Write a file that was sent along and return its path, which is named by its content."""
    content = base64.b64decode(encoded)
    path = store / hashlib.sha256(content).hexdigest()[:32] / Path(name).name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        handle, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(aside).rename(path)
    return path


def _end_with_stdin() -> None:
    """Treat the end of stdin as Ctrl-C: without a terminal, nothing else says that the other side is gone."""
    link = os.dup(0)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(link, 4096):
                pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1])))
