"""Starting daemons, waiting for them, and ending exactly the processes of one cluster.

Daemons run in the foreground as our children, so a pid is never a guess. They end with us when the test session is
killed (`setpriv --pdeathsig`), so that they can remove their files; tests.session_end ends those that do not, and job
steps. Job steps detach from slurmd; they are recognised by the SLURM_CONF in
their environment, which names a scratch folder nobody else uses.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launcher.contract.processes import start_ticks
from tests.session_end import mark


class DaemonGroup:
    """Daemons by name, ended in the reverse of the order in which they were started."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._starter = ThreadPoolExecutor(1)  # the kernel's "parent" is a thread: of these the one that started them

    def start(self, name: str, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start `command` in the foreground of a session of its own; its output goes to NAME.out."""
        if name in self._running:
            raise RuntimeError(f"{name} is running already")
        with (self._logs / f"{name}.out").open("ab") as output:
            started = self._starter.submit(
                subprocess.Popen,
                ["setpriv", "--pdeathsig", "TERM", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**env, **mark()},
                start_new_session=True,
            )
            self._running[name] = started.result()

    def stop(self, name: str, *, how: signal.Signals = signal.SIGTERM, patience: float = 30.0) -> None:
        """End one daemon; a daemon that does not end by it is killed."""
        process = self._running.pop(name, None)
        if process is None:
            return
        process.send_signal(how)
        try:
            process.wait(patience)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def stop_all(self) -> None:
        for name in reversed(list(self._running)):
            self.stop(name)

    def ended(self) -> list[str]:
        """Return the names of daemons that ended by themselves."""
        return [name for name, process in list(self._running.items()) if process.poll() is not None]


def pids_with(settings: Mapping[str, str]) -> Iterator[int]:
    """Yield the processes that were started with all of `settings` in their environment."""
    wanted = {f"{name}={value}".encode() for name, value in settings.items()}
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((directory / "environ").read_bytes().split(b"\0")):
                yield int(directory.name)


def kill_all_with(settings: Mapping[str, str], *, patience: float = 60.0) -> None:
    """Kill the processes that carry `settings`, and those they start meanwhile, until none is left."""

    def none_left() -> bool:
        pids = _oldest_first(pids_with(settings))
        # Stopped, none sees another one's end and acts on it. Children go before parents: the kernel wakes stopped
        # processes whose parent has gone, with SIGHUP, on which an srun would end its step on other nodes.
        for how, order in ((signal.SIGSTOP, pids), (signal.SIGKILL, reversed(pids))):
            for pid in order:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)
        return not pids

    wait_until(none_left, f"processes with {dict(settings)} to end", timeout=patience, interval=0.05)


def _oldest_first(pids: Iterable[int]) -> list[int]:
    return sorted(pids, key=lambda pid: (start_ticks(pid) or 0, pid))


def wait_until(done: Callable[[], bool], what: str, *, timeout: float, interval: float = 0.2) -> None:
    """Poll `done`, and raise a TimeoutError that names `what` when it stays false."""
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout:g} s for {what}")
        time.sleep(interval)


def accepts_connections(port: int) -> bool:
    """Return whether something listens on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below those of rendezvous (20000) and clients, so that none gets taken."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(11000, 20000), 1000):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"found {len(found)} free ports, {count} are needed")
