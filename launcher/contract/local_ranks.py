"""`python -m launcher.contract.local_ranks --ranks N --log-dir DIR -- COMMAND`: run ranks on this machine.

Each rank gets torchrun's variables and a log file of its own. Signals are forwarded. When one rank fails, the others
get a grace period and are then ended. The exit code is that of the first rank that failed. Ranks die with this process,
whatever kills it.

Rejected: torchrun, which restarts failed ranks and masks their exit codes.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

GRACE_SECONDS = 30.0
"""How long the other ranks may continue after one has failed, and then again between TERM and KILL."""

_POLL_SECONDS = 0.05
_PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, run the ranks and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launcher.contract.local_ranks", description="Start the ranks of a local run."
    )
    parser.add_argument("--ranks", type=int, required=True, help="number of ranks")
    parser.add_argument("--log-dir", type=Path, required=True, help="where rank-<N>.log files go")
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS, help="seconds before ranks are ended")
    parser.add_argument("command", nargs="+", help="what each rank runs, after --")
    options = parser.parse_args(arguments)
    _die_with(os.getppid())()
    return run_ranks(options.command, options.ranks, options.log_dir, options.grace)


def run_ranks(
    command: Sequence[str],
    ranks: int,
    log_dir: Path,
    grace: float = GRACE_SECONDS,
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run `command` once for each rank and return the exit code of the first rank that failed, or 0.

    Each rank has this process's environment, with `variables` in place of what it says otherwise.
    """
    environment = {**os.environ, **(variables or {})}
    log_dir.mkdir(parents=True, exist_ok=True)
    processes: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        _signal_all(processes, number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)}
    try:
        with held_port() as port:
            for rank in range(ranks):
                processes.append(_start(command, environment, rank, ranks, port, log_dir / f"rank-{rank}.log"))
            return _attend(processes, grace, log_dir / "failure")
    finally:
        _signal_all(processes, signal.SIGKILL)
        for process in processes:
            process.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _start(
    command: Sequence[str], shared: Mapping[str, str], rank: int, ranks: int, port: int, log: Path
) -> subprocess.Popen[bytes]:
    environment = {
        **shared,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    with log.open("ab") as file:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=_die_with(os.getpid()),
        )


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a child does before exec: ask the kernel to kill it when its parent ends."""
    libc = ctypes.CDLL(None, use_errno=True)

    def ask() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # bash makes background jobs ignore it
        if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0 or os.getppid() != parent:
            os._exit(1)

    return ask


def _attend(processes: Sequence[subprocess.Popen[bytes]], grace: float, failure: Path) -> int:
    """Wait for all ranks and return the exit code. Once one fails, record which and end the others, TERM then KILL."""
    failed: int | None = None
    failed_at = 0.0
    steps = [(grace, signal.SIGTERM), (2 * grace, signal.SIGKILL)]
    while True:
        codes = [process.poll() for process in processes]
        if failed is None:
            rank = next((rank for rank, code in enumerate(codes) if code), None)
            if rank is not None:
                failed, failed_at = _exit_code(codes[rank] or 0), time.monotonic()
                first = _record_first(failure, failed, rank)
                print(f"rank {first} failed first, with exit code {failed}", flush=True)
        if all(code is not None for code in codes):
            return failed or 0
        if failed is not None and steps and time.monotonic() - failed_at >= steps[0][0]:
            number = steps.pop(0)[1]
            running = [rank for rank, code in enumerate(codes) if code is None]
            print(f"ending ranks {', '.join(map(str, running))} with {number.name}", flush=True)
            _signal_all(processes, number)
        time.sleep(_POLL_SECONDS)


def _record_first(failure: Path, code: int, rank: int) -> str:
    """Write down which rank failed first, unless the watchdog recorded another one before, and return which it is."""
    with contextlib.suppress(OSError):  # a full disk, perhaps what the rank failed of, must not hide its exit code
        with contextlib.suppress(FileExistsError), failure.open("x", encoding="utf-8") as file:
            file.write(f"{code} {rank} {socket.gethostname()}\n")
        words = failure.read_text(encoding="utf-8").split()
        return words[1] if len(words) > 1 else str(rank)
    return str(rank)


def _exit_code(code: int) -> int:
    """Return the exit code that a shell reports: 128 + N for death by signal N."""
    return 128 - code if code < 0 else code


def _signal_all(processes: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Yield a port for rank 0 to listen on, which the kernel gives to nobody else meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # exclusively, hence before the option that lets rank 0 bind it too
        # torch opens rank 0's socket with SO_REUSEADDR. It can then listen, because this one never does.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        yield int(holder.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
