"""`python -m launcher.attempts.notify RUN --attempt A --exit-code N`: notify people how an attempt ended.

The batch script calls it when an attempt ends, whatever ended it. It always exits with 0 and waits a few seconds at
most: a node without network or mail must not fail a run. A webhook's address is often a secret itself, so it is named
by a variable and never printed, not even when it does not work.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from email.message import EmailMessage
from pathlib import Path

from launcher.contract.errors import LauncherError
from launcher.contract.exit_codes import ExitCode
from launcher.contract.records import read_progress
from launcher.contract.rundir import RunPaths
from launcher.contract.spec import NotifySpec, read_resolved
from launcher.contract.spec.notify import WEB_SCHEMES

_SECONDS = 10.0
_OUTCOMES = {int(ExitCode.OK): "completed", int(ExitCode.REQUEUE): "interrupted"}
_SENDMAIL = ("/usr/sbin", "/usr/lib")


class _NoAddress(ValueError):
    """The webhook's variable does not hold an address."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse and send."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.attempts.notify", description="Tell how an attempt ended."
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--attempt", required=True)
    parser.add_argument("--exit-code", type=int, required=True)
    options = parser.parse_args(arguments)
    paths = RunPaths(options.run)
    try:
        notify = read_resolved(paths.config).notify
        message = message_of(paths, options.attempt, options.exit_code)
    except (LauncherError, OSError, ValueError) as error:  # a notification must not make a run fail
        print(f"no notification: {error}", file=sys.stderr)
        return 0
    for problem in send(notify, message):
        print(f"no notification by {problem}", file=sys.stderr)
    return 0


def message_of(paths: RunPaths, attempt: str, exit_code: int) -> dict[str, object]:
    """Return the message in the form in which a webhook and a command get it."""
    progress = read_progress(paths)
    outcome = _OUTCOMES.get(exit_code, "failed")
    message: dict[str, object] = {
        "run": paths.name,
        "directory": str(paths.root),
        "attempt": attempt,
        "outcome": outcome,
        "exit_code": exit_code,
        "host": socket.gethostname(),
        "time": time.time(),
    }
    message |= {name: progress.get(name) for name in ("step", "max_steps", "loss", "checkpoint")}
    return {**message, "text": _sentence(message)}


def _sentence(message: dict[str, object]) -> str:
    where = f" at step {message['step']} of {message['max_steps']}" if message["step"] is not None else ""
    code = f" with exit code {message['exit_code']}" if message["exit_code"] else ""
    return f"run {message['run']} {message['outcome']}{where}{code} (attempt {message['attempt']})"


def send(notify: NotifySpec, message: dict[str, object]) -> list[str]:
    """Send the message by every way that is configured, and return what did not work."""
    if notify.on == "failure" and message["outcome"] != "failed":
        return []
    ways: list[tuple[str, Callable[[], None]]] = []
    if notify.webhook_env:
        ways.append((f"webhook {notify.webhook_env}", lambda: _post(notify.webhook_env or "", message)))
    if notify.email:
        ways.append((f"email to {notify.email}", lambda: _mail(notify.email or "", message)))
    if notify.command:
        ways.append((f"command {notify.command[0]}", lambda: _feed(notify.command, json.dumps(message) + "\n")))
    problems = []
    for name, way in ways:
        try:
            way()
        except (OSError, ValueError, subprocess.SubprocessError, http.client.HTTPException) as error:
            problems.append(f"{name}: {_reason(error)}")
    return problems


def _post(variable: str, message: dict[str, object]) -> None:
    address = os.environ.get(variable, "")
    if not address.startswith(WEB_SCHEMES):
        raise _NoAddress(f"{variable} is not set to a http(s) address in the job's environment")
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(address, json.dumps(message).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=_SECONDS):
        pass


def _mail(address: str, message: dict[str, object]) -> None:
    letter = EmailMessage()
    letter["To"] = address
    letter["Subject"] = message["text"]
    letter.set_content("".join(f"{name}: {value}\n" for name, value in message.items() if name != "text"))
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SENDMAIL])
    sendmail = shutil.which("sendmail", path=path)
    if sendmail is None:
        raise FileNotFoundError("there is no sendmail on this node")
    _feed([sendmail, "-i", "--", address], letter.as_string())


def _feed(command: Sequence[str], text: str) -> None:
    subprocess.run(command, input=text, text=True, timeout=_SECONDS, check=True, stdout=subprocess.DEVNULL)


def _reason(error: Exception) -> str:
    """Return the error without the address that it may hold."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code}"
    if isinstance(error, urllib.error.URLError):
        return "no connection"
    if isinstance(error, subprocess.CalledProcessError):
        return f"exit code {error.returncode}"
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no end within {_SECONDS:g} s"
    return str(error) if isinstance(error, (_NoAddress, FileNotFoundError)) else type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
