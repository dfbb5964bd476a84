"""Send this launcher's code and one command to a host, and run the command there as if it were typed there.

Code is sent once, as it is named by a hash of its content. Words of the command, files and values of `env_from` go by
stdin: an argument list would show them to other users and to the shells on the way. The command itself then runs with
the terminal, if there is one; without one, closing the pipe to it stands for Ctrl-C.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from launcher.contract.errors import ConfigError, LauncherError, SchedulerError
from launcher.contract.resources import Kind, own_folders
from launcher.contract.spec import RunSpec
from launcher.remote import deposit
from launcher.remote.ssh import LOST, Host
from launcher.submission.code_snapshot import digest_of, travelling_code

_LARGEST_FILE = 10 << 20
"""Bytes of a file that is sent with a command; data belongs on the cluster."""

_START = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"

_CHECKOUT = b"[metadata]\nname = slurm-sft-launcher\n"
"""A setup.cfg makes the code a checkout, so that each run gets a copy of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One command to run on another machine."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables to set there."""
    files: Sequence[Mapping[str, str]] = ()
    """`written`: the path in the command or the config; `name`; `content` (base64)."""
    source: Mapping[str, object] = field(default_factory=dict)
    """Git state of the code that is sent."""
    diff: str = ""
    """Uncommitted changes in it."""


def read_files(paths: Iterable[str | None]) -> list[dict[str, str]]:
    """Return those of the paths that are files here, as a Request holds them.

    Raise ConfigError for a file that is too large to be text.
    """
    files = []
    for path in map(Path, filter(None, paths)):
        if not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(
                f"{path} has {path.stat().st_size >> 20} MiB, and at most {_LARGEST_FILE >> 20} go with a command; "
                "copy it to the host and give its path there"
            )
        content = base64.b64encode(path.read_bytes()).decode()
        files.append({"written": str(path), "name": path.name, "content": content})
    return files


def run_on_host(host: Host, request: Request, spec: RunSpec) -> int:
    """Run the command on the host, with its output and Ctrl-C passed on, and return its exit code."""
    program, stored = _deposit(host, request, spec)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    words = host.command([host.python, program, stored], terminal=terminal)
    code = subprocess.call(words) if terminal else _run_with_pipe(words)
    if code == LOST:
        raise SchedulerError(
            f"the connection to {host.name} ended before the command did, which may have succeeded. "
            "Run it again: a submission that was begun is finished, not repeated"
        )
    return code


def _run_with_pipe(words: Sequence[str]) -> int:
    """Run ssh with a pipe for its stdin, whose end stops the command on the host, and return the exit code."""
    process = subprocess.Popen(words, stdin=subprocess.PIPE)
    try:
        return process.wait()
    finally:
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        process.kill()


def _deposit(host: Host, request: Request, spec: RunSpec) -> tuple[str, str]:
    """Store code and command on the host, and return the paths there of the program to run and of the command."""
    program, code = Path(deposit.__file__).read_bytes(), _files_to_send(spec)
    words = host.command([host.python, "-c", _START, str(len(program))])
    answer: dict[str, str] = {}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError), process:  # the other end can stop at any time, with a reason or without
        answer = _talk(process, host, program, code, request)
    if "error" in answer:
        raise ConfigError(answer["error"])
    if "request" not in answer:
        raise _no_answer(host, process.returncode)
    return answer["program"], answer["request"]


def _talk(
    process: subprocess.Popen[bytes], host: Host, program: bytes, code: Mapping[str, bytes], request: Request
) -> dict[str, str]:
    """Do this side's part of `deposit.deposit`, and return its last answer."""
    if process.stdin is None or process.stdout is None:
        raise TypeError("both ends must be pipes")
    head = {"directory": host.directory, "code": digest_of(sorted(code.items()))[:32]}
    _send(process.stdin, program, json.dumps(head).encode(), b"\n")
    answer = _answer(process.stdout)
    if "code" not in answer:
        return answer
    if answer["code"] == "need":
        packed = _packed(code)
        print(f"sending the launcher's code to {host.name} ({len(packed) >> 10} KiB, once)", file=sys.stderr)
        _send(process.stdin, str(len(packed)).encode(), b"\n", packed)
    whole = dataclasses.asdict(request) | {"directory": host.directory, "cluster": host.cluster}
    _send(process.stdin, json.dumps(whole).encode())
    process.stdin.close()
    return _answer(process.stdout)


def _send(pipe: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        pipe.write(part)
    pipe.flush()


def _answer(pipe: IO[bytes]) -> dict[str, str]:
    """Return the next answer, past whatever a login shell prints, or an empty one at the end of the output."""
    for line in pipe:
        if line.startswith(deposit.MARK.encode()):
            return dict(json.loads(line.removeprefix(deposit.MARK.encode())))
    return {}


def _no_answer(host: Host, code: int) -> LauncherError:
    if code == LOST:
        return SchedulerError(f"ssh could not connect to {host.name}, or lost the connection; its message is above")
    return ConfigError(
        f"cluster.host_python: {host.python!r} did not run on {host.name} (exit code {code}); "
        "give a Python there that has the launcher's packages"
    )


def _files_to_send(spec: RunSpec) -> dict[str, bytes]:
    """Return name -> content: the launcher in code/, the user's own templates and cluster files in home/."""
    files = {"code/setup.cfg": _CHECKOUT}
    files |= {f"code/{name}": path.read_bytes() for name, path in travelling_code(spec).items()}
    kinds: tuple[Kind, ...] = ("cluster_configs", "templates")
    for kind in kinds:
        for folder in reversed(own_folders(kind)):  # the first folder wins, as it does here
            own = [path for path in folder.glob("*.*") if path.suffix in (".yaml", ".j2")]
            files |= {f"home/{kind}/{path.name}": path.read_bytes() for path in own}
    return files


def _packed(files: Mapping[str, bytes]) -> bytes:
    """Return the files as a compressed tar archive."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=5) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
