"""Where each rank stands when one of them hangs, and which of them is behind.

Nobody sends heartbeats. A rank keeps its position in its own memory; once somebody is overdue it asks, over the
rendezvous store, and all answer. So a run that is well costs one look at a key every few seconds, in memory of rank
0's process, and the shared file system is written once, by one rank, when there is something to tell. Rejected:
heartbeat files, which cost a shared file system an operation for each rank and beat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

from sft.runtime.rank_env import RankEnv

T = TypeVar("T")

_WAITING = ("/torch/distributed/", "/megatron/core/pipeline_parallel/", "/megatron/core/distributed/")
"""Where the main thread stands while it waits for other ranks."""
_STORE_SECONDS = 10.0


class Phase(IntEnum):
    """What a rank is at; in the order of a step, so that a smaller one is behind."""

    LOADING = 0
    """Data, process groups, weights, a checkpoint."""
    DATA = 1
    """The next batch."""
    STEP = 2
    """Forward, backward, optimizer."""
    GUARD = 3
    """Looking at the step's numbers; going back to a checkpoint where they are bad."""
    EVALUATION = 4
    """Held-out loss and answers."""
    CHECKPOINT = 5
    """Saving, and what else happens between steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """Where one rank stands."""

    rank: int
    host: str
    pid: int
    step: int = 0
    """Steps it has finished."""
    phase: str = Phase.LOADING.name
    seconds: float = 0.0
    """For how long it has been in that phase."""
    where: str = ""
    """Innermost frame of its main thread."""
    waiting: bool = False
    """Whether that frame waits for other ranks."""
    answered: bool = False
    """Whether the rank said this itself, or was silent when it was asked."""
    process: str = ""
    """What the kernel says of a silent rank's process, e.g. T (stopped)."""

    def describe(self) -> str:
        state = f"{self.phase.lower()} after step {self.step}, for {self.seconds:.0f} s, at {self.where}"
        silent = f"gave no answer{f'; its process is {self.process}' if self.process else ''}"
        return f"rank {self.rank} on {self.host}: {state if self.answered else silent}"


def main_thread_place() -> tuple[str, bool]:
    """`file:line function` of the main thread's innermost frame, and whether it waits for other ranks there."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "", False
    code = frame.f_code
    return f"{code.co_filename}:{frame.f_lineno} {code.co_name}", any(part in code.co_filename for part in _WAITING)


def behind(positions: Sequence[Position]) -> list[Position]:
    """The ranks that the others wait for: silent ones, else those least far, else those that wait for nobody.

    All of them where nothing tells them apart.
    """
    silent = [position for position in positions if not position.answered]
    if silent:
        return silent
    least = min((position.step, Phase[position.phase]) for position in positions)
    last = [position for position in positions if (position.step, Phase[position.phase]) == least]
    return [position for position in last if not position.waiting] or last


def process_state(pid: int) -> str:
    """The kernel's word for a process of this host."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("State:"):
                return line.removeprefix("State:").strip()
    return "gone"


class Board:
    """Positions of all ranks in the rendezvous store, and the request for them.

    The store lives in rank 0, which may be what hangs, and its calls then never come back: each runs in a thread of
    its own and is given up after a while. From then on nothing can be asked, and every rank goes by its own clock.
    """

    def __init__(self, env: RankEnv) -> None:
        self._env = env
        self._store: Any = None
        self.lost = env.world_size == 1

    def join(self, position: Position) -> None:
        """Connect, once the ranks have met, and tell who this is."""
        if self.lost or self._store is not None:
            return
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

        def connect() -> Any:
            store = TCPStore(
                self._env.master_addr, self._env.master_port, is_master=False, timeout=timedelta(seconds=_STORE_SECONDS)
            )
            return PrefixStore("watchdog", store)

        self._store = self._call(connect)
        self.tell(position)

    def tell(self, position: Position) -> None:
        """Publish a position."""
        text = json.dumps(dataclasses.asdict(position))
        self._call(lambda: self._store.set(f"rank/{position.rank}", text))

    def ask(self) -> None:
        """Ask all ranks where they stand."""
        self._call(lambda: self._store.set("asked", "1"))

    def is_asked(self) -> bool:
        return bool(self._store is not None and self._call(lambda: self._store.check(["asked"])))

    def close(self) -> None:
        """Let all ranks end."""
        self._call(lambda: self._store.set("closed", "1"))

    def is_closed(self) -> bool:
        return self.lost or bool(self._call(lambda: self._store.check(["closed"])))

    def positions(self, ranks: Iterable[int]) -> list[Position]:
        """What is known of these ranks; those that never told anything are absent."""

        def read() -> list[Position]:
            known = [f"rank/{rank}" for rank in ranks if self._store.check([f"rank/{rank}"])]
            return [Position(**json.loads(self._store.get(key))) for key in known]

        return self._call(read) or []

    def _call(self, call: Callable[[], T]) -> T | None:
        """The result, or None where the store cannot be reached."""
        if self.lost:
            return None
        result: list[T] = []

        def run() -> None:
            with contextlib.suppress(Exception):  # torch raises several kinds; each means: no store
                result.append(call())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(2 * _STORE_SECONDS)
        self.lost = not result
        return result[0] if result else None


def claim(path: Path) -> bool:
    """Whether this rank is the one that tells: the first to make the file."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    return True
