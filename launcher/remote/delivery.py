"""Brings this launcher's code and one command to a host, and runs the command there as if it were here.

The code goes once: it is named by a hash of what it holds. Command words, files and values of `env_from` go by stdin:
none is in an argument list, and no shell on the way gets to see them. The command then has the terminal to itself
where there is one; without one, the end of our pipe to it is its Ctrl-C.
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
from typing import IO, Any

from launcher.contract.errors import ConfigError, LauncherError, SchedulerError
from launcher.contract.resources import Kind, own_folders
from launcher.contract.spec import RunSpec
from launcher.remote import deposit
from launcher.remote.ssh import LOST, Host
from launcher.submission.code_snapshot import digest_of, travelling_code

_LARGEST_FILE = 10 << 20
"""Bytes of a file that goes with a command; data belongs on the cluster."""

_START = "import sys; exec(sys.stdin.buffer.read(int(sys.argv[1])))"

_CHECKOUT = b"[metadata]\nname = slurm-sft-launcher\n"
"""A setup.cfg: it makes the code a checkout, of which each run gets its copy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One command."""

    words: tuple[str, ...]
    environment: Mapping[str, str]
    files: Sequence[Mapping[str, str]] = ()
    """`written`: the path in command or config; `name`, `content` (base64)."""
    source: Mapping[str, Any] = field(default_factory=dict)
    diff: str = ""


def read_files(paths: Iterable[str | None]) -> list[dict[str, str]]:
    """Those of the paths that are files here, for a Request; ConfigError where one is too large to be text."""
    files = []
    for path in map(Path, filter(None, paths)):
        if not path.is_file():
            continue
        if path.stat().st_size > _LARGEST_FILE:
            raise ConfigError(
                f"{path}: {path.stat().st_size >> 20} MiB are not sent with a command (at most {_LARGEST_FILE >> 20}); "
                "copy it to the host and name it by its path there"
            )
        content = base64.b64encode(path.read_bytes()).decode()
        files.append({"written": str(path), "name": path.name, "content": content})
    return files


def run(host: Host, request: Request, spec: RunSpec) -> int:
    """Run the command on the host; its exit code. Its output is ours, and so is its Ctrl-C."""
    program, given = _deposit(host, request, spec)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    words = host.command([host.python, program, given], terminal=terminal)
    code = subprocess.call(words) if terminal else _tethered(words)
    if code == LOST:
        raise SchedulerError(
            f"the connection to {host.name} ended before the command did; it may have been carried out. "
            "Give it again: a submission that was begun is finished, not repeated"
        )
    return code


def _tethered(words: Sequence[str]) -> int:
    """Run ssh with a pipe that stays open as long as we are there; the far end stops when it closes."""
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
    """Leave code and command on the host; the paths of the program that runs it and of the command."""
    program, luggage = Path(deposit.__file__).read_bytes(), _luggage(spec)
    words = host.command([host.python, "-c", _START, str(len(program))])
    answer: dict[str, str] = {}
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with contextlib.suppress(BrokenPipeError), process:  # it can end at any time, and has said why or not
        answer = _talk(process, host, program, luggage, request)
    if "error" in answer:
        raise ConfigError(answer["error"])
    if "request" not in answer:
        raise _no_answer(host, process.returncode)
    return answer["program"], answer["request"]


def _talk(
    process: subprocess.Popen[bytes], host: Host, program: bytes, luggage: Mapping[str, bytes], request: Request
) -> dict[str, str]:
    """What `deposit.deposit` said last."""
    if process.stdin is None or process.stdout is None:
        raise TypeError("both ends must be pipes")
    head = {"directory": host.directory, "code": digest_of(sorted(luggage.items()))[:32]}
    _send(process.stdin, program, json.dumps(head).encode(), b"\n")
    answer = _answer(process.stdout)
    if "code" not in answer:
        return answer
    if answer["code"] == "need":
        packed = _packed(luggage)
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
    """The next answer, past whatever a login shell prints; empty where there is none."""
    for line in pipe:
        if line.startswith(deposit.MARK.encode()):
            return dict(json.loads(line.removeprefix(deposit.MARK.encode())))
    return {}


def _no_answer(host: Host, code: int) -> LauncherError:
    if code == LOST:
        return SchedulerError(f"ssh did not reach {host.name}, or lost it; what it said is above")
    return ConfigError(
        f"cluster.host_python: {host.python!r} did not run on {host.name} (exit code {code}); "
        "name a Python there that has the launcher's packages"
    )


def _luggage(spec: RunSpec) -> dict[str, bytes]:
    """Name -> content: the launcher below code/, the user's own templates and cluster files below home/."""
    files = {"code/setup.cfg": _CHECKOUT}
    files |= {f"code/{name}": path.read_bytes() for name, path in travelling_code(spec).items()}
    kinds: tuple[Kind, ...] = ("cluster_configs", "templates")
    for kind in kinds:
        for folder in reversed(own_folders(kind)):  # the first folder wins here, too
            found = [path for path in folder.glob("*.*") if path.suffix in (".yaml", ".j2")]
            files |= {f"home/{kind}/{path.name}": path.read_bytes() for path in found}
    return files


def _packed(files: Mapping[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=5) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return packed.getvalue()
